"""The owner's side of a mirror: uploads a commit's files, seals them with an entry of the log, removes the oldest."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from treadle.platform.errors import CheckpointError
from treadle.platform.failpoints import failpoint
from treadle.platform.mirror import (
    DATA,
    MANIFEST,
    Commit,
    File,
    Mirror,
    Owner,
    data_folder,
    encode_manifest,
    entry_path,
    owner_of,
)
from treadle.platform.storage import BLOCK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file to mirror under its name in the run folder: the first `size` bytes of the file at `path`, or `data`.

    `crc32` is what those bytes must have, -1 where nobody knows. A `lasting` file is written once: it is not uploaded
    again while its size and checksum are those of the mirrored one.
    """

    name: str
    path: Path | None = None
    data: bytes = b""
    size: int
    crc32: int = -1
    lasting: bool = False

    def blocks(self) -> Iterator[bytes]:
        """The bytes. Raises `CheckpointError` where the file is gone or shorter."""
        if self.path is None:
            yield self.data
            return
        left = self.size
        try:
            with self.path.open("rb") as file:
                while left and (block := file.read(min(left, BLOCK_BYTES))):
                    left -= len(block)
                    yield block
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read to be mirrored: {error}.") from error
        if left:
            raise CheckpointError(f"{self.path} is {left} bytes shorter than when it was committed.")


class MirrorWriter:
    """Commits to a mirror as the owner `number` that `Mirror.claim` returned. For one thread.

    A commit that failed half-way may be repeated; what is uploaded then is not uploaded again.
    """

    def __init__(self, mirror: Mirror, number: int) -> None:
        self._mirror, self._store, self.owner = mirror, mirror.store, number
        self._commits = mirror.commits()
        self._files = {commit.number: self._files_of(commit) for commit in self._commits}
        self._next = number + 1
        newest = self._commits[-1].number if self._commits else 0
        self._lasting = dict(self._files.get(newest, {}))
        self._sent: dict[Source, File] = {}
        self._checksums: dict[tuple[Path, int, int], int] = {}

    @property
    def newest(self) -> Commit | None:
        """The newest commit of the mirror, whoever made it."""
        return self._commits[-1] if self._commits else None

    def _files_of(self, commit: Commit) -> dict[str, File]:
        try:
            return self._mirror.manifest(commit)
        except CheckpointError:
            return {}  # nobody can load it, so nothing of it has to be kept

    def commit(self, stage: str, step: int, sources: Sequence[Source]) -> Commit:
        """Uploads the sources in their order, then a manifest, then the entry that makes them a commit. Raises
        `FencedError` where somebody else owns the mirror by now, `CheckpointError` for a source that is missing or
        damaged, `StorageError` for everything that may pass."""
        self._check_held()
        folder = data_folder(self.owner, self._next)
        files = {source.name: self._uploaded(source, folder) for source in sources}
        failpoint("mirror.before_manifest")
        manifest = encode_manifest(files)
        path = f"{folder}/{MANIFEST}"
        self._store.write_bytes(path, manifest)
        failpoint("mirror.before_commit")
        commit = Commit(
            number=self._next,
            owner=self.owner,
            stage=stage,
            step=step,
            unix_s=time.time(),
            manifest=path,
            crc32=zlib.crc32(manifest),
        )
        self._append(commit)
        self._commits.append(commit)
        self._files[commit.number] = files
        self._next += 1
        self._sent.clear()
        return commit

    def retain(self, keep: int) -> list[Commit]:
        """Removes all commits but the newest `keep` of every stage, and every object that no commit needs: those of
        removed commits, of interrupted uploads, of owners that were replaced. Returns the removed commits."""
        stages = {commit.stage for commit in self._commits}
        kept = {c.number for s in stages for c in [c for c in self._commits if c.stage == s][-keep:]}
        surplus = [commit for commit in self._commits if commit.number not in kept]
        for commit in surplus:
            self._store.remove(entry_path(commit.number))  # first, so that half a removal is no commit
            self._commits.remove(commit)
            self._files.pop(commit.number)
        needed = {file.path for files in self._files.values() for file in files.values()}
        needed |= {commit.manifest for commit in self._commits}
        for name in self._store.files(DATA):
            path = f"{DATA}/{name}"
            if owner_of(name) <= self.owner and path not in needed:
                self._store.remove(path)
        return surplus

    def _check_held(self) -> None:
        """Finds out before gigabytes are uploaded; `_append` is what decides."""
        if self._store.exists(entry_path(self._next)):
            self._raise_fenced()

    def _append(self, commit: Commit) -> None:
        if not self._mirror.append(commit):
            self._raise_fenced()

    def _raise_fenced(self) -> None:
        owners = [entry for entry in self._mirror.entries() if isinstance(entry, Owner)]
        raise self._mirror.fenced(owners[-1] if owners else None)

    def _uploaded(self, source: Source, folder: str) -> File:
        if source in self._sent:
            return self._sent[source]
        held = self._lasting.get(source.name)
        if source.lasting and held and held.bytes == source.size and held.crc32 == self._checksum(source):
            return held
        path, crc = f"{folder}/{source.name}", 0
        with self._store.writing(path) as sink:
            for block in source.blocks():
                crc = zlib.crc32(block, crc)
                sink.write(block)
            if source.crc32 not in (-1, crc):
                raise CheckpointError(
                    f"{source.path} is damaged: its CRC-32 is not that of its checkpoint's manifest."
                )
        file = File(path=path, bytes=source.size, crc32=crc)
        self._sent[source] = file
        if source.lasting:
            self._lasting[source.name] = file
        return file

    def _checksum(self, source: Source) -> int:
        if source.path is None:
            return zlib.crc32(source.data)
        try:
            status = source.path.stat()
        except OSError as error:
            raise CheckpointError(f"{source.path} cannot be read to be mirrored: {error}.") from error
        key = (source.path, status.st_size, status.st_mtime_ns)
        if key not in self._checksums:
            crc = 0
            for block in source.blocks():
                crc = zlib.crc32(block, crc)
            self._checksums[key] = crc
        return self._checksums[key]
