"""The owner's side of a mirror: uploads a commit's files, seals them with an entry of the log, removes the oldest."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
    again while its size and checksum are those of the mirrored one. `expendable`: see `File`.
    """

    name: str
    path: Path | None = None
    data: bytes = b""
    size: int
    crc32: int = -1
    lasting: bool = False
    expendable: bool = False

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
        self._files = {commit: self._files_of(commit) for commit in mirror.commits()}
        self._next, self._attempt = number + 1, 0
        self._lasting = dict(list(self._files.values())[-1]) if self._files else {}
        self._sent: dict[Source, File] = {}
        self._checksums: dict[tuple[Path, int, int], int] = {}

    def _files_of(self, commit: Commit) -> dict[str, File]:
        try:
            return self._mirror.manifest(commit)
        except CheckpointError:
            return {}  # nobody can load it, so nothing of it has to be kept

    def commit(self, stage: str, step: int, sources: Sequence[Source]) -> Commit:
        """Uploads the sources in their order, then a manifest, then the entry that makes them a commit. Raises
        `FencedError` where somebody else owns the mirror by now, `CheckpointError` for a source that is missing or
        damaged, `StorageError` for everything that may pass."""
        self._catch_up()  # finds out before gigabytes are uploaded
        self._attempt += 1
        folder = data_folder(self.owner, self._attempt)
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
        while not self._mirror.append(commit):
            self._catch_up()
            commit = replace(commit, number=self._next)
        self._files[commit] = files
        self._next = commit.number + 1
        self._sent.clear()
        return commit

    def _catch_up(self) -> None:
        """Takes note of own commits whose answer got lost. Raises `FencedError` where the next number is another
        owner's: it is what decides who may commit."""
        while (entry := self._mirror.entry(self._next)) is not None:
            if not isinstance(entry, Commit) or entry.owner != self.owner:
                owners = [one for one in self._mirror.entries() if isinstance(one, Owner)]
                raise self._mirror.fenced(owners[-1] if owners else None)
            self._files[entry] = self._files_of(entry)
            self._next += 1

    def retain(self, keep: int) -> list[Commit]:
        """Removes all commits but the newest `keep` of every stage, and every object that no commit needs: those of
        removed commits, of interrupted uploads, of owners that were replaced. Returns the removed commits."""
        stages = {commit.stage for commit in self._files}
        kept = {c for s in stages for c in [c for c in self._files if c.stage == s][-keep:]}
        surplus = [commit for commit in self._files if commit not in kept]
        for commit in surplus:
            self._store.remove(entry_path(commit.number))  # first, so that half a removal is no commit
            del self._files[commit]
        needed = {file.path for files in self._files.values() for file in files.values()}
        needed |= {commit.manifest for commit in self._files}
        held = {f"{DATA}/{name}": size for name, size in self._store.files(DATA).items()}
        for path in held:
            if owner_of(path) <= self.owner and path not in needed:
                self._store.remove(path)
        self._lasting = {  # what is missing, or was removed, has to be uploaded again
            name: file
            for name, file in self._lasting.items()
            if file.path in needed and held.get(file.path) == file.bytes
        }
        return surplus

    def _uploaded(self, source: Source, folder: str) -> File:
        if source in self._sent:
            return self._sent[source]
        held = self._lasting.get(source.name)
        if source.lasting and held and held.bytes == source.size and held.crc32 == self._checksum(source):
            return held
        path, crc = f"{folder}/{source.name}", 0
        if source.size <= BLOCK_BYTES:  # one request to a bucket instead of a stream's three
            data = b"".join(source.blocks())
            crc = _checked(source, zlib.crc32(data))
            self._store.write_bytes(path, data)
        else:
            with self._store.writing(path) as sink:
                for block in source.blocks():
                    crc = zlib.crc32(block, crc)
                    sink.write(block)
                _checked(source, crc)
        file = File(path=path, bytes=source.size, crc32=crc, expendable=source.expendable)
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


def _checked(source: Source, crc: int) -> int:
    """The checksum, if it is the one that the bytes must have."""
    if source.crc32 not in (-1, crc):
        raise CheckpointError(
            f"{source.path} is damaged: its CRC-32 is not that of its checkpoint's manifest."
        )
    return crc
