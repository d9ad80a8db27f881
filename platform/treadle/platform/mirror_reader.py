"""The reader's side of a mirror: the newest commit whose files are all there, and all intact, on this disk."""

from __future__ import annotations

import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

from treadle.platform.errors import CheckpointError, DataError, StorageError
from treadle.platform.mirror import DATA, Commit, File, Mirror, Unreadable
from treadle.platform.storage import Store, open_store

FETCH_ATTEMPTS = 3
"""For a file whose body is cut short: the one failure that the request's own retries do not cover."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """The commit whose files were fetched, their bytes, and a sentence for each newer commit that was passed over and
    each expendable file that was left out."""

    commit: Commit
    bytes: int
    passed_over: tuple[str, ...]


def fetch_newest(mirror: Mirror, folder: Path) -> Fetched:
    """Fetches the newest valid commit into a new folder. One that is damaged is passed over for the one before; a
    mirror that does not answer is an error, because the newest commit may be intact. Raises `DataError` where no commit
    is valid or the mirror is in another format, and `StorageError`."""
    told: list[str] = []
    for entry in reversed(mirror.entries()):
        if isinstance(entry, Unreadable):
            told.append(f"entry {entry.number} of {mirror.url} is passed over: {entry.reason}")
        if not isinstance(entry, Commit):
            continue
        try:
            count, left_out = _fetch(mirror, entry, folder)
        except CheckpointError as error:
            told.append(f"{entry} of {mirror.url} is passed over: {error.message}")
        else:
            return Fetched(commit=entry, bytes=count, passed_over=(*told, *left_out))
    raise DataError(
        f"{mirror.url} holds no commit that a run can continue from. {' '.join(told)}".strip(),
        "Check the URL, and that the run had committed anything.",
    )


def _fetch(mirror: Mirror, commit: Commit, folder: Path) -> tuple[int, list[str]]:
    """How many bytes were fetched, and which expendable files were left out, and why."""
    shutil.rmtree(folder, ignore_errors=True)
    files, store, target = mirror.manifest(commit), mirror.store, open_store(folder)
    sizes = {f"{DATA}/{name}": size for name, size in store.files(DATA).items()}
    for name, file in files.items():
        if name.startswith("/") or ".." in name.split("/"):  # a bucket may have other writers
            raise CheckpointError(f"its manifest names {name!r}, which lies outside a run folder.")
        if not file.expendable:  # before the first byte is fetched
            _check_size(store, file, sizes)
    count, left_out = 0, []
    for name, file in files.items():
        try:
            _check_size(store, file, sizes)
            _fetch_file(store, file, target, name)
            count += file.bytes
        except CheckpointError as error:
            if not file.expendable:
                raise
            target.remove(name)
            left_out.append(f"{name} is left out: {error.message}")
    return count, left_out


def _check_size(store: Store, file: File, sizes: dict[str, int]) -> None:
    if file.path not in sizes:
        raise CheckpointError(f"{store.url_of(file.path)} is missing.")
    if sizes[file.path] != file.bytes:
        raise CheckpointError(f"{store.url_of(file.path)} has {sizes[file.path]} bytes, not {file.bytes}.")


def _fetch_file(store: Store, file: File, target: Store, name: str) -> None:
    for attempt in range(1, FETCH_ATTEMPTS + 1):
        try:
            crc = _copied(store, file.path, target, name)
            break
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise CheckpointError(f"{store.url_of(file.path)} is listed, and cannot be found.") from error
            if attempt == FETCH_ATTEMPTS:
                raise
    if crc != file.crc32:
        raise CheckpointError(
            f"{store.url_of(file.path)} is damaged: its CRC-32 does not match the manifest."
        )


def _copied(store: Store, path: str, target: Store, name: str) -> int:
    """Streams one file to the disk and returns its checksum."""
    crc = 0
    with target.writing(name) as sink:
        for block in store.blocks(path):
            crc = zlib.crc32(block, crc)
            sink.write(block)
    return crc
