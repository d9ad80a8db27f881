"""Buckets through an fsspec URL, for engines that no fast network reaches: what both sides can open carries them.

    <url>/0002-5f3a91c0/000017/00000000 …      what sender 2 wrote in its 17th sending, a piece of a version each
    <url>/0002-5f3a91c0/000017/manifest.json   their checksums; created last, and exclusively

A sender is a process of the learner. No name is ever used twice, so that nothing is overwritten, not even by a request
that was given up and is carried out late. The ticket names the folder and the checksum of its manifest; an engine
fetches that, then the pieces, checks each and asks again for what is missing or wrong.

Of what it wrote, a sender keeps the newest two versions, from every base they were offered from: whoever fetches an
older one is late, and what it fetches is adopted by nobody. Everything else is removed in the background, with
what senders before this one left. Whoever chose the URL removes the rest at the end (`workflows.weights_url`).
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from treadle.actors.broadcast.url_objects import (
    MANIFEST,
    PIECE_BYTES,
    Pieces,
    create,
    each,
    opened,
    patiently,
    piece,
    places,
    read,
)
from treadle.platform.errors import BroadcastError, ConfigError, DeadlineError, StorageError
from treadle.platform.records import WeightManifest
from treadle.platform.storage import Store

KEPT = 2
"""Versions that stay: the newest, and the one that engines hold should it be given up."""
_PART = 0.9
"""Of a receiver's deadline: it shall be able to say which object was late to a coordinator with the same deadline."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlTicket:
    """Where a version lies, and what its manifest must be."""

    step: int
    url: str
    folder: str
    manifest_bytes: int
    manifest_crc32: int
    timeout_s: float
    transport: str = "url"


class UrlTransport:
    """Sends by writing below `url`; a request is given up after `timeout_s` without a byte, a whole sending after
    `deadline_s`. Receiving needs none of these: the ticket has them."""

    def __init__(self, url: str = "", timeout_s: float = 20.0, deadline_s: float = 300.0) -> None:
        self._url, self._timeout_s, self._deadline_s = url, timeout_s, deadline_s

    def send(self, manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]]) -> UrlTicket:
        """Raises `DeadlineError`, or `BroadcastError` for what waiting does not help, both naming URL and object."""
        if not self._url:
            raise ConfigError("broadcast.url is empty.", "Name a URL that learner and engines can open.")
        version, until = manifest.version.step, time.monotonic() + self._deadline_s
        try:
            return _Sender.of(self._url, self._timeout_s, until).send(manifest, buckets, until)
        except TimeoutError as error:
            raise DeadlineError(
                f"broadcast.send: version {version} was not written to {self._url} within {self._deadline_s:.0f} s: "
                f"{error}",
                "Look at the storage behind broadcast.url, or raise broadcast.gather_deadline_s.",
            ) from error
        except StorageError as error:
            raise BroadcastError(
                f"broadcast.send: version {version} cannot be written: {error.message}",
                "Look at the storage behind broadcast.url.",
            ) from error

    def receive(self, ticket: object, deadline_s: float) -> list[NDArray[np.uint8]]:
        """Fresh arrays of this process. Raises like `send`."""
        if not isinstance(ticket, UrlTicket):
            raise BroadcastError(f"broadcast.receive: {type(ticket).__name__} is no url ticket.")
        until = time.monotonic() + _PART * deadline_s
        try:
            return _Fetch(ticket, until).run()
        except TimeoutError as error:
            raise DeadlineError(
                f"broadcast.receive: version {ticket.step} did not arrive within {deadline_s:g} s: {error}",
                "Raise broadcast.stage_deadline_s, or look at the storage behind broadcast.url.",
            ) from error
        except StorageError as error:
            raise BroadcastError(
                f"broadcast.receive: version {ticket.step} cannot be fetched: {error.message}",
                "Fetch the newest version; if that fails, too, look at the storage behind broadcast.url.",
            ) from error


class _Fetch:
    """One version on its way into this process."""

    def __init__(self, ticket: UrlTicket, until: float) -> None:
        self._ticket, self._until = ticket, until
        self._buckets: list[NDArray[np.uint8]] = []
        self._pieces: Pieces | None = None

    def run(self) -> list[NDArray[np.uint8]]:
        each(self._open, [f"{self._ticket.folder}/{MANIFEST}"], self._until, self._named)
        assert self._pieces is not None
        sizes, at_most = self._pieces.bucket_bytes, self._pieces.piece_bytes
        self._buckets = [np.empty(size, dtype=np.uint8) for size in sizes]
        where = places(sizes, at_most)
        parts = list(zip(range(len(where)), self._pieces.piece_crc32, where, strict=True))
        each(self._take, parts, self._until, lambda part: self._named(piece(self._ticket.folder, part[0])))
        return self._buckets

    def _named(self, path: str) -> str:
        return f"{self._ticket.url}/{path}"

    def _open(self, path: str) -> None:
        data = self._read(path, self._ticket.manifest_bytes, self._ticket.manifest_crc32)
        self._pieces = Pieces.decode(data)

    def _take(self, part: tuple[int, int, tuple[int, int, int]]) -> None:
        index, crc32, (bucket, start, stop) = part
        data = self._read(piece(self._ticket.folder, index), stop - start, crc32)
        self._buckets[bucket][start:stop] = np.frombuffer(data, dtype=np.uint8)

    def _read(self, path: str, size: int, crc32: int) -> bytes:
        def ask() -> bytes:
            store = opened(self._ticket.url, self._ticket.timeout_s)
            return read(store, path, size, lambda data: zlib.crc32(data) == crc32)

        return patiently(ask, self._until)


class _Sender:
    """What this process writes below a URL, and what of that is still needed."""

    _senders: ClassVar[dict[str, _Sender]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def of(cls, url: str, timeout_s: float, until: float) -> _Sender:
        """Raises `StorageError` and `TimeoutError`."""
        with cls._lock:
            if url not in cls._senders:
                each(lambda _: cls._enter(url, timeout_s, until), [url], until, str)
            return cls._senders[url]

    @classmethod
    def _enter(cls, url: str, timeout_s: float, until: float) -> None:
        def ask() -> _Sender:
            store = opened(url, timeout_s)
            return cls(store, timeout_s, [_number_of(name) for name in store.list()])

        cls._senders[url] = patiently(ask, until)

    def __init__(self, store: Store, timeout_s: float, before: Sequence[int]) -> None:
        self._store, self._timeout_s = store, timeout_s
        self._number = max(before, default=0) + 1
        self._name = f"{self._number:04d}-{secrets.token_hex(4)}"
        self._serials = itertools.count(1)
        self._needed: dict[str, tuple[str, str]] = {}  # by folder: a version's digest, and its base's
        self._changing = threading.Lock()
        self._sweeping = threading.Lock()

    def send(self, manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]], until: float) -> UrlTicket:
        folder = f"{self._name}/{next(self._serials):06d}"
        digest, base = manifest.version.digest, "" if manifest.base is None else manifest.base.digest
        with self._changing:
            self._needed[folder] = (digest, base)
        try:
            listed = self._written(folder, manifest, buckets, until).encode()

            def seal(path: str) -> None:
                patiently(lambda: create(self._store, path, listed), until)

            each(seal, [f"{folder}/{MANIFEST}"], until, self._store.url_of)
        except BaseException:
            with self._changing:
                del self._needed[folder]
            raise
        self._outdate(folder, digest, base)
        threading.Thread(target=self._sweep, name="weights-sweep", daemon=True).start()
        return UrlTicket(
            step=manifest.version.step,
            url=self._store.url,
            folder=folder,
            manifest_bytes=len(listed),
            manifest_crc32=zlib.crc32(listed),
            timeout_s=self._timeout_s,
        )

    def _written(
        self, folder: str, manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]], until: float
    ) -> Pieces:
        sizes = tuple(len(bucket) for bucket in buckets)
        where = places(sizes, PIECE_BYTES)
        checksums = [0] * len(where)

        def put(index: int) -> None:
            bucket, start, stop = where[index]
            data = buckets[bucket][start:stop].tobytes()
            checksums[index] = zlib.crc32(data)
            patiently(lambda: self._store.write_bytes(piece(folder, index), data), until)

        each(put, range(len(where)), until, lambda index: self._store.url_of(piece(folder, index)))
        return Pieces(
            step=manifest.version.step,
            digest=manifest.version.digest,
            base="" if manifest.base is None else manifest.base.digest,
            bucket_bytes=sizes,
            piece_bytes=PIECE_BYTES,
            piece_crc32=tuple(checksums),
        )

    def _outdate(self, folder: str, digest: str, base: str) -> None:
        """Only the newest `KEPT` versions are needed, and of one from the same base what was written last."""
        with self._changing:
            del self._needed[folder]
            others = {f: way for f, way in self._needed.items() if way != (digest, base)}
            self._needed = {**others, folder: (digest, base)}
            newest = list(dict.fromkeys(way[0] for way in reversed(self._needed.values())))[:KEPT]
            self._needed = {f: way for f, way in self._needed.items() if way[0] in newest}

    def _sweep(self) -> None:
        """Removes what is not needed. One that fails is repeated with the next sending."""
        if not self._sweeping.acquire(blocking=False):
            return
        try:
            # In this order: what is written from here on is not listed, or needed already.
            folders = {path.rpartition("/")[0] for path in self._store.files()}
            with self._changing:
                needed = set(self._needed)
            own = {folder for folder in folders - needed if folder.startswith(self._name)}
            older = {f.partition("/")[0] for f in folders if 0 < _number_of(f) < self._number}
            for folder in sorted(own | older):
                self._store.remove(folder)
        except StorageError as error:
            _log.warning("broadcast: old weights were not removed: %s", error.message)
        finally:
            self._sweeping.release()


def _number_of(path: str) -> int:
    """Of the sender that a path below the URL belongs to; 0 for what no sender wrote."""
    head = path.split("-")[0]
    return int(head) if head.isdecimal() else 0
