"""Files by URL: the same code for a disk, S3 and memory.

A `Store` is a folder named by a URL; paths inside it are relative, with `/`. Nothing half-written ever stands
under a final name: on a disk a file is written beside it, synced and renamed; on S3 a put is atomic by
itself.

Every failure is one `StorageError` that names the URL (for S3 also the endpoint) and says what to do. Retries
happen in one layer only: botocore's for requests, plus a single re-read of a response body that was cut
short. An S3 endpoint is asked once per process whether anybody answers, with short timeouts, so that a wrong
endpoint is reported in seconds while real transfers keep patient ones.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import secrets
import shutil
import ssl
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from treadle.platform.errors import StorageError
from treadle.platform.local_disk import beside, create_exclusive, free_bytes_at, write_synced

BLOCK_BYTES = 4 * 2**20
S3_CONNECT_TIMEOUT_S = 5
S3_READ_TIMEOUT_S = 60
S3_ATTEMPTS = 4
PROBE_TIMEOUT_S = 4
PROBE_ATTEMPTS = 2
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def open_store(url: str | Path, *, read_timeout_s: float = S3_READ_TIMEOUT_S) -> Store:
    """The store at a path or an fsspec URL (`file://`, `s3://`, `memory://`, ...). S3 takes its endpoint from
    `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, its region from `AWS_DEFAULT_REGION`, its credentials from
    where botocore finds them; each of its requests is given up after `read_timeout_s` without a byte. Raises
    `StorageError` when nobody answers there."""
    text = str(url)
    scheme = text.partition("://")[0] if "://" in text else "file"
    if scheme in ("s3", "s3a"):
        return Store(_s3_filesystem(text, read_timeout_s), text.rstrip("/"), endpoint=_s3_endpoint() or "AWS")
    if scheme in ("file", "local"):
        path = os.path.abspath(text.partition("://")[2] if "://" in text else text)
        return Store(LocalFileSystem(), path)
    try:
        filesystem = fsspec.filesystem(scheme)
    except (ValueError, ImportError) as error:
        raise StorageError(
            f"{text}: no storage for {scheme}:// ({error}).", "Use a path, s3:// or file://."
        ) from error
    return Store(filesystem, text.rstrip("/"))


def open_parent(url: str | Path) -> tuple[Store, str]:
    """The store around a single file, and the file's name in it."""
    head, _, name = str(url).rpartition("/")
    return open_store(head or ("/" if str(url).startswith("/") else ".")), name


class Store:
    """A folder on a disk, in a bucket or in memory."""

    def __init__(self, filesystem: Any, url: str, endpoint: str = "") -> None:
        self.url = url
        self.is_local = isinstance(filesystem, LocalFileSystem)
        self._fs = filesystem
        self._endpoint = endpoint
        self._root = str(filesystem._strip_protocol(url)).rstrip("/")

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.url,)

    def child(self, path: str) -> Store:
        """The store of a folder inside this one; it need not exist."""
        return Store(self._fs, self.url_of(path), self._endpoint)

    def url_of(self, path: str) -> str:
        return f"{self.url}/{path}".rstrip("/")

    def path_of(self, path: str) -> Path:
        """The path on this machine's disk. Raises `StorageError` for a store that is not on it."""
        if not self.is_local:
            raise StorageError(f"{self.url} is not on a local disk.")
        return Path(self._full(path))

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/") if path else self._root

    def try_read(self, path: str) -> bytes | None:
        """The whole file, or None when there is none."""
        try:
            return self.read_bytes(path)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def read_bytes(self, path: str) -> bytes:
        with self._named(path, "read"):
            try:
                return bytes(self._fs.cat_file(self._full(path)))
            except _cut_short():
                return bytes(self._fs.cat_file(self._full(path)))

    def write_bytes(self, path: str, data: bytes) -> None:
        """Writes the whole file or nothing; an older file of that name stays until then."""
        with self._named(path, "write"):
            if self.is_local:
                with beside(Path(self._full(path))) as (target, temporary):
                    write_synced(temporary, data)
                    os.replace(temporary, target)
            else:
                self._fs.pipe_file(self._full(path), data)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Writes a file that must not exist yet; False when somebody else was first. Of many writers exactly
        one gets True, and nobody ever reads a part of the data."""
        with self._named(path, "create"):
            try:
                if self.is_local:
                    create_exclusive(Path(self._full(path)), data)
                else:
                    self._fs.pipe_file(self._full(path), data, mode="create")
            except FileExistsError:
                return False
            return True

    def exists(self, path: str = "") -> bool:
        with self._named(path, "look for"):
            return bool(self._fs.exists(self._full(path)))

    def size_bytes(self, path: str) -> int:
        with self._named(path, "size"):
            return int(self._fs.info(self._full(path))["size"])

    def list(self, path: str = "") -> list[str]:
        """Names of the files and folders directly inside, sorted; empty when there is no such folder."""
        with self._named(path, "list"):
            try:
                entries = self._fs.ls(self._full(path), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        full = self._full(path)
        return sorted({str(e).rstrip("/").rpartition("/")[2] for e in entries if str(e).rstrip("/") != full})

    def files(self, path: str = "") -> dict[str, int]:
        """All files below, `{relative path: size in bytes}`, sorted; empty when there is no such folder."""
        full = self._full(path)
        with self._named(path, "list"):
            found = self._fs.find(full, detail=True)
        sizes = {str(name)[len(full) :].lstrip("/"): int(info["size"]) for name, info in found.items()}
        return {name: sizes[name] for name in sorted(sizes) if name and not _is_temporary(name)}

    def remove(self, path: str) -> None:
        """Removes a file or a folder with all it holds; nothing happens when there is none."""
        with self._named(path, "remove"), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._full(path), recursive=True)

    @contextlib.contextmanager
    def reading(self, path: str) -> Iterator[IO[bytes]]:
        """The file as a stream."""
        with (
            self._named(path, "read"),
            self._fs.open(self._full(path), "rb", block_size=BLOCK_BYTES) as stream,
        ):
            yield stream

    @contextlib.contextmanager
    def writing(self, path: str) -> Iterator[IO[bytes]]:
        """A stream whose bytes appear under `path` when the block ends, and never if it raises."""
        with self._named(path, "write"):
            if self.is_local:
                with beside(Path(self._full(path))) as (target, temporary):
                    with open(temporary, "wb") as stream:
                        yield stream
                        stream.flush()
                        os.fsync(stream.fileno())
                    os.replace(temporary, target)
                return
            if isinstance(self._fs, MemoryFileSystem):  # its files are visible from the first byte on
                buffer = io.BytesIO()
                yield buffer
                self._fs.pipe_file(self._full(path), buffer.getvalue())
                return
            stream = self._fs.open(self._full(path), "wb", block_size=8 * BLOCK_BYTES, autocommit=False)
            try:
                yield stream
                stream.close()
            except BaseException:
                stream.discard()
                raise
            stream.commit()

    def crc32(self, path: str) -> int:
        """CRC-32 of the file's bytes, read once in blocks."""
        crc = 0
        for block in self.blocks(path):
            crc = zlib.crc32(block, crc)
        return crc

    def blocks(self, path: str) -> Iterator[bytes]:
        """The file's bytes in blocks. What goes wrong while it is read is said of this file, also where another one
        is being written."""
        with self.reading(path) as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block

    def copy_to(self, path: str, other: Store, target: str) -> None:
        """Streams one file into another store."""
        with other.writing(target) as sink:
            for block in self.blocks(path):
                sink.write(block)

    def upload(self, folder: Path, path: str = "") -> None:
        """Copies the files of a local folder so that `folder/x` becomes `path/x`, whether or not `path`
        exists already."""
        source = open_store(folder)
        for name in source.files():
            source.copy_to(name, self, f"{path}/{name}".lstrip("/"))

    def download(self, folder: Path, path: str = "") -> None:
        """The reverse of `upload`. Raises `StorageError` when there is nothing below `path`."""
        names = self.files(path)
        if not names:
            raise StorageError(f"{self.url_of(path)} holds no files.", "Check the URL.")
        target = open_store(folder)
        for name in names:
            self.copy_to(f"{path}/{name}".lstrip("/"), target, name)

    @contextlib.contextmanager
    def _named(self, path: str, action: str) -> Iterator[None]:
        """Turns failures of the file system into one `StorageError`."""
        try:
            yield
        except StorageError:
            raise
        except _failures() as error:
            raise self._explained(error, path, action) from error

    def _explained(self, error: Exception, path: str, action: str) -> StorageError:
        url = self.url_of(path)
        number = getattr(error, "errno", None)
        if number in _NO_SPACE:
            free = free_bytes_at(Path(self._full(path))) if self.is_local else 0
            return StorageError(
                f"disk full: cannot {action} {url}, {free} bytes are free.", "Free space or move the run."
            )
        at = f" at endpoint {self._endpoint}" if self._endpoint else ""
        if isinstance(error, FileNotFoundError):
            return StorageError(
                f"cannot {action} {url}{at}: it does not exist.", "Check the path, or the bucket."
            )
        if isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
            return StorageError(
                f"cannot {action} {url}{at}: access denied ({error}).", "Check permissions and credentials."
            )
        return StorageError(f"cannot {action} {url}{at}: {type(error).__name__}: {error}.")


def _is_temporary(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.startswith(".") and base.endswith(".tmp")


@contextlib.contextmanager
def local_path(url: str | Path, cache: Path | None = None) -> Iterator[Path]:
    """A folder on this disk with the contents of `url`: the folder itself when it is local, else a copy under
    `cache` (default `$TREADLE_CACHE` or `~/.cache/treadle`), which is reused while the remote files keep
    their names, sizes and entity tags. Several processes may ask at once."""
    store = open_store(url)
    if store.is_local:
        yield store.path_of("")
        return
    root = cache or Path(os.environ.get("TREADLE_CACHE") or Path.home() / ".cache" / "treadle")
    copy = root / _contents_id(store)
    if not copy.is_dir():
        partial = root / f".{copy.name}.{secrets.token_hex(4)}"
        try:
            store.download(partial)
            with contextlib.suppress(OSError):  # another process finished the same copy first
                partial.rename(copy)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    yield copy


def _contents_id(store: Store) -> str:
    with store._named("", "list"):
        found = store._fs.find(store._root, detail=True)
    parts = [f"{name}:{info['size']}:{info.get('ETag', '')}" for name, info in sorted(found.items())]
    return hashlib.blake2b("\n".join([store.url, *parts]).encode(), digest_size=16).hexdigest()


def free_bytes(url: str | Path) -> int | None:
    """Free space on the disk behind a URL; None where that has no meaning."""
    store = open_store(url)
    return free_bytes_at(store.path_of("")) if store.is_local else None


def _s3_endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _s3_filesystem(url: str, read_timeout_s: float) -> Any:
    endpoint = _s3_endpoint()
    _probe(endpoint or f"https://s3.{os.environ.get('AWS_DEFAULT_REGION', 'us-east-1')}.amazonaws.com", url)
    filesystem = fsspec.filesystem(
        "s3",
        endpoint_url=endpoint or None,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": S3_CONNECT_TIMEOUT_S,
            "read_timeout": read_timeout_s,
            "retries": {"total_max_attempts": S3_ATTEMPTS, "mode": "standard"},
        },
    )
    filesystem.retries = 1  # s3fs would repeat botocore's repetitions
    return filesystem


_answering: set[str] = set()


def _probe(endpoint: str, url: str) -> None:
    """Asks the endpoint anything, once per process. Any HTTP answer will do, a refusal included."""
    if endpoint not in _answering:
        _ask(endpoint, url)
        _answering.add(endpoint)


def _ask(endpoint: str, url: str) -> None:
    for attempt in range(1, PROBE_ATTEMPTS + 1):
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S):
                return
        except urllib.error.HTTPError:
            return
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):
                return
            if attempt == PROBE_ATTEMPTS:
                raise StorageError(
                    f"{url}: the S3 endpoint {endpoint} does not answer ({reason}).",
                    "Check AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and the network.",
                ) from error


def _failures() -> tuple[type[Exception], ...]:
    """What file systems raise. A library that is not loaded cannot have raised anything."""
    botocore = sys.modules.get("botocore.exceptions")
    remote = (botocore.BotoCoreError, botocore.ClientError) if botocore else ()
    return (OSError, *remote, *_cut_short())


def _cut_short() -> tuple[type[Exception], ...]:
    """A response body that ended early: the one failure that botocore does not retry."""
    aiohttp = sys.modules.get("aiohttp")
    return (aiohttp.ClientPayloadError,) if aiohttp else ()
