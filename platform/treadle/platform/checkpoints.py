"""Checkpoints that are either whole or not there.

    checkpoints/<stage>/step-00000050/   shards, written by the learner, in any number of files and folders
                                         manifest.json: every file's size and CRC-32, and the `CheckpointMeta`
                                         COMMITTED: created last

The manifest and the marker are created exclusively. Whoever creates the manifest owns the checkpoint; the
marker says that nothing is missing. A folder without a marker is a write that was interrupted and is never
loaded; one with a marker is loaded only if every file still has its size and checksum.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treadle.platform.errors import CheckpointError, DataError, StorageError
from treadle.platform.failpoints import failpoint
from treadle.platform.local_disk import sync_folder
from treadle.platform.records import CheckpointRef, Json
from treadle.platform.storage import Store, open_store

FORMAT = 1
MANIFEST = "manifest.json"
MARKER = "COMMITTED"
_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMeta:
    """What a run needs besides weights to continue: `step` steps are made, prompts before `cursor` were
    issued, and `ledger_mark` is the step of the ledger's mark (-1 for a stage without groups)."""

    step: int
    cursor: int
    ledger_mark: int = -1
    config_fingerprint: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)  # of the libraries that wrote it
    extra: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A checkpoint folder that was not chosen, and why."""

    url: str
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Newest:
    """The newest checkpoint that can be loaded (`ref` and `meta`), or none; and the newer ones passed
    over."""

    ref: CheckpointRef | None
    meta: CheckpointMeta | None
    skipped: tuple[Skipped, ...]


class Checkpoints:
    """The checkpoints of a run, under a path or an fsspec URL."""

    def __init__(self, root: str | Path) -> None:
        self._store = open_store(root)

    def url(self, stage: str, step: int) -> str:
        """The folder of one checkpoint; `step` is the number of steps behind it."""
        return self._store.url_of(_folder(stage, step))

    def begin(self, stage: str, step: int) -> str:
        """Clears what an interrupted write left and returns the URL to write the shards to. Raises
        `CheckpointError` where that checkpoint is committed already."""
        path = _folder(stage, step)
        if self._store.exists(f"{path}/{MARKER}"):
            raise CheckpointError(
                f"{self._store.url_of(path)} is committed already.",
                "Choose a new run folder, or resume this run.",
            )
        self._store.remove(path)
        return self._store.url_of(path)

    def commit(self, stage: str, meta: CheckpointMeta) -> CheckpointRef:
        """Seals the shards of `meta.step`. Raises `CheckpointError` where there are none, or where another
        writer was first."""
        path = _folder(stage, meta.step)
        store = self._store.child(path)
        names = [name for name in store.files() if name not in (MANIFEST, MARKER)]
        if not names:
            raise CheckpointError(
                f"{store.url} holds no files to commit.", "Save the learner's state there first."
            )
        failpoint("checkpoint.before_manifest")
        _sync(store, names)
        manifest = _encode(meta, {name: _entry(store, name) for name in names})
        if not store.create_exclusive(MANIFEST, manifest) and store.try_read(MANIFEST) != manifest:
            raise CheckpointError(f"{store.url} was sealed by another writer.", "Stop one of the two runs.")
        failpoint("checkpoint.before_marker")
        # A marker that is there already (a repeated request, a writer that woke up late) seals this manifest.
        if not store.create_exclusive(MARKER, b"") and store.try_read(MANIFEST) != manifest:
            raise CheckpointError(f"{store.url} was sealed by another writer.", "Stop one of the two runs.")
        return CheckpointRef(url=store.url, stage=stage, step=meta.step)

    def newest_valid(self, stage: str) -> Newest:
        """Looks from the newest step down for a committed checkpoint whose files are all intact. Raises `DataError`
        for one in another format: it is nothing damaged that could be passed over."""
        skipped: list[Skipped] = []
        for step in reversed(self._steps(stage)):
            ref = CheckpointRef(url=self.url(stage, step), stage=stage, step=step)
            try:
                return Newest(ref=ref, meta=verify(ref.url), skipped=tuple(skipped))
            except CheckpointError as error:
                skipped.append(Skipped(url=ref.url, step=step, reason=error.message))
        return Newest(ref=None, meta=None, skipped=tuple(skipped))

    def committed(self, stage: str) -> list[CheckpointRef]:
        """All with a marker, oldest first; their files are not checked."""
        return [
            CheckpointRef(url=self.url(stage, step), stage=stage, step=step)
            for step in self._steps(stage)
            if self._store.exists(f"{_folder(stage, step)}/{MARKER}")
        ]

    def retain(self, stage: str, keep: int, spared: Collection[int] = frozenset()) -> list[CheckpointRef]:
        """Removes all committed ones but the newest `keep` (at least one) and those of the `spared` steps, and returns
        the removed."""
        if keep < 1:
            raise CheckpointError(
                f"keep={keep} would remove every checkpoint.", "Set checkpoint.keep to 1 or more."
            )
        surplus = [ref for ref in self.committed(stage)[:-keep] if ref.step not in spared]
        for ref in surplus:
            self._remove(stage, ref.step)
        return surplus

    def remove_uncommitted(self, stage: str) -> list[str]:
        """Removes what interrupted writes left and returns the URLs. Only for a run that has no other
        writer."""
        kept = {ref.step for ref in self.committed(stage)}
        torn = [step for step in self._steps(stage) if step not in kept]
        for step in torn:
            self._remove(stage, step)
        return [self.url(stage, step) for step in torn]

    def remove_after(self, stage: str, step: int) -> list[CheckpointRef]:
        """Removes committed ones of later steps: a run that continues from `step` makes them anew."""
        later = [ref for ref in self.committed(stage) if ref.step > step]
        for ref in later:
            self._remove(stage, ref.step)
        return later

    def _remove(self, stage: str, step: int) -> None:
        path = _folder(stage, step)
        self._store.remove(f"{path}/{MARKER}")  # first, so that half a removal is no checkpoint
        self._store.remove(path)

    def _steps(self, stage: str) -> list[int]:
        matches = [_FOLDER.fullmatch(name) for name in self._store.list(_checked(stage))]
        return sorted(int(match[1]) for match in matches if match)


def verify(folder: str | Path) -> CheckpointMeta:
    """Reads every file of a checkpoint. Raises `CheckpointError` saying what is missing or damaged, and `DataError`
    for a format that this version does not read."""
    store = open_store(folder)
    if not store.exists(MARKER):
        raise CheckpointError(f"{store.url} is not committed: its writing was interrupted.")
    meta, files = _decode(store)
    sizes = store.files()
    for name, entry in files.items():
        if name not in sizes:
            raise CheckpointError(f"{store.url_of(name)} is missing.")
        if sizes[name] != entry["bytes"]:
            raise CheckpointError(f"{store.url_of(name)} has {sizes[name]} bytes, not {entry['bytes']}.")
    for name, entry in files.items():
        if _crc32(store, name) != entry["crc32"]:
            raise CheckpointError(f"{store.url_of(name)} is damaged: its CRC-32 does not match the manifest.")
    return meta


def manifest_of(folder: str | Path) -> dict[str, dict[str, int]]:
    """The files of a checkpoint by name, with their `bytes` and `crc32`. Raises like `verify` for the manifest."""
    return _decode(open_store(folder))[1]


def _checked(stage: str) -> str:
    if not re.fullmatch(r"[\w][\w.-]*", stage):
        raise CheckpointError(
            f"stage name {stage!r} cannot name a folder.", "Use letters, digits, -, _ and dots."
        )
    return stage


def _folder(stage: str, step: int) -> str:
    return f"{_checked(stage)}/step-{step:08d}"


def _entry(store: Store, name: str) -> dict[str, int]:
    return {"bytes": store.size_bytes(name), "crc32": _crc32(store, name)}


def _crc32(store: Store, name: str) -> int:
    try:
        return store.crc32(name)
    except StorageError as error:
        raise CheckpointError(error.message, error.remedy) from error


def _sync(store: Store, names: list[str]) -> None:
    """Shards are written by others, who may not have synced them."""
    if not store.is_local:
        return
    for name in names:
        descriptor = os.open(store.path_of(name), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for folder in {store.path_of(name).parent for name in names} | {store.path_of("").parent}:
        sync_folder(folder)


def _encode(meta: CheckpointMeta, files: Mapping[str, Mapping[str, int]]) -> bytes:
    body = {"format": FORMAT, "meta": dataclasses.asdict(meta), "files": files}
    return json.dumps({**body, "crc32": _body_crc32(body)}, indent=1).encode()


def _body_crc32(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _decode(store: Store) -> tuple[CheckpointMeta, dict[str, dict[str, int]]]:
    data = store.try_read(MANIFEST)
    if data is None:
        raise CheckpointError(f"{store.url_of(MANIFEST)} is missing.")
    try:
        body = json.loads(data)
        crc = body.pop("crc32")
        damaged = crc != _body_crc32(body)
    except (ValueError, KeyError, TypeError, AttributeError):
        damaged = True
    if damaged:
        raise CheckpointError(f"{store.url_of(MANIFEST)} is damaged.")
    if body["format"] != FORMAT:
        raise DataError(
            f"{store.url}: checkpoint format {body['format']}, this version reads {FORMAT}.",
            "Resume with the version of Treadle that wrote it.",
        )
    return CheckpointMeta(**body["meta"]), body["files"]
