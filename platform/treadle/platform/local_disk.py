"""What a disk needs so that a file is there whole or not at all, also after a power cut."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def free_bytes_at(path: Path) -> int:
    """Free space on the disk that holds the path, which need not exist."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


@contextlib.contextmanager
def beside(target: Path) -> Iterator[tuple[Path, Path]]:
    """The target and a temporary name in its folder; the temporary file is gone afterwards and the folder's
    entries are on the disk."""
    _make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield target, temporary
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut (syncing a file alone does not)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file whose bytes are on the disk when this returns."""
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def create_exclusive(target: Path, data: bytes) -> None:
    """Makes a complete file appear under a free name. Raises `FileExistsError` where the name is taken."""
    with beside(target) as (_, temporary):
        write_synced(temporary, data)
        # A hard link fails if the name is taken, and the name never shows a partial file.
        os.link(temporary, target)
