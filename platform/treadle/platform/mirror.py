"""A run's copy behind a URL, complete enough to continue from on a machine that has never seen the run.

    log/00000001                            who owns the mirror, or what was committed to it: an entry per number
    data/00000001/00000002/<file of a run>  what owner 1 uploaded in its second attempt, and its manifest.json

The log decides everything. An entry is created exclusively, under the number after the newest one, and last of all a
commit writes. Taking a mirror over is an entry as well: of a commit and a takeover, or of two takeovers, exactly one
gets the number, and an owner that was replaced finds the number after its own newest entry taken. It can commit nothing
more. Entries of owners are never removed, which keeps that true. Every attempt's data has a folder of its own, so that
nothing that is committed is ever overwritten, not even by a request that was given up and is carried out late.

A manifest names every file of the run, its size, its CRC-32 and the object that holds it. Files that do not change are
uploaded once and named again by later manifests.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treadle.platform.errors import CheckpointError, ConfigError, DataError, FencedError, StorageError
from treadle.platform.storage import open_store

FORMAT = 1
LOG, DATA, MANIFEST = "log", "data", "manifest.json"
LISTING_ATTEMPTS = 3
CLAIM_ATTEMPTS = 8
"""Each failed one needs a commit of the owner before, made at that very moment."""
_NUMBER = re.compile(r"\d{8,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """From entry `number` on, the run folder `id` commits; `by` names its process for people."""

    number: int
    id: str
    by: str
    unix_s: float
    nonce: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A stage's state after `step` steps, as `owner` (an entry's number) committed it at `unix_s`. `manifest` is the
    path of its manifest, `crc32` that file's checksum."""

    number: int
    owner: int
    stage: str
    step: int
    unix_s: float
    manifest: str
    crc32: int

    def __str__(self) -> str:
        return f"commit {self.number} ({self.stage}, step {self.step})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """An entry that is there and says nothing."""

    number: int
    reason: str


Entry = Owner | Commit | Unreadable


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of a mirrored run: the path that holds its bytes, relative to the mirror, and what they must be. A run can
    be continued without an `expendable` one."""

    path: str
    bytes: int
    crc32: int
    expendable: bool = False


class Mirror:
    """A mirror as anybody may read it. `claim` makes the caller its owner, `MirrorWriter` then commits to it.

    Raises `StorageError` where the URL does not answer; a request waits at most `timeout_s` for a byte.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self.store = open_store(url, read_timeout_s=timeout_s)

    @property
    def url(self) -> str:
        return self.store.url

    def entries(self) -> list[Entry]:
        """The log, oldest first. Raises `StorageError` for an entry that is listed and not found, time and again, and
        `DataError` for one in another format, which must not be passed over."""
        for _ in range(LISTING_ATTEMPTS):
            numbers = sorted(int(n) for n in self.store.list(LOG) if _NUMBER.fullmatch(n))
            read = {number: self.entry(number) for number in numbers}
            gone = [number for number, entry in read.items() if entry is None]
            if not gone:  # an owner removes old commits while others read
                return [entry for entry in read.values() if entry is not None]
        raise StorageError(
            f"{self.store.url_of(entry_path(gone[0]))} is listed, and cannot be found.", "Try again."
        )

    def entry(self, number: int) -> Entry | None:
        """One entry of the log, or None where its number is free. Raises like `entries`."""
        data = self.store.try_read(entry_path(number))
        return None if data is None else _decode(number, data, self.store.url_of(entry_path(number)))

    def commits(self) -> list[Commit]:
        """Oldest first."""
        return [entry for entry in self.entries() if isinstance(entry, Commit)]

    def check_free(self) -> None:
        """Raises `ConfigError` where a run is mirrored there already."""
        owners = [entry for entry in self.entries() if isinstance(entry, Owner)]
        if owners:
            raise self._of_another_run(owners[-1])

    def claim(self, id: str, by: str, *, take_over: bool = False) -> int:
        """Makes the run folder `id` the owner, under the number returned. Only an empty mirror and the own one can be
        claimed, unless `take_over` takes it from whoever has it; of several that do, the last one keeps it. Raises
        `FencedError` where another folder has taken it over, `ConfigError` for another run's mirror."""
        for _ in range(CLAIM_ATTEMPTS):
            entries = self.entries()
            owners = [entry for entry in entries if isinstance(entry, Owner)]
            if owners and owners[-1].id != id and not take_over:
                mine_before = any(owner.id == id for owner in owners)
                raise self.fenced(owners[-1]) if mine_before else self._of_another_run(owners[-1])
            number = entries[-1].number + 1 if entries else 1
            mine = Owner(number=number, id=id, by=by, unix_s=time.time(), nonce=secrets.token_hex(8))
            if self.append(mine):
                return number
        raise StorageError(f"{self.url} changes too often to be claimed.", "Try again.")

    def _of_another_run(self, owner: Owner) -> ConfigError:
        return ConfigError(
            f"checkpoint.mirror={self.url} holds the mirror of another run ({owner.by}).",
            f"Name another prefix, or continue that run with `treadle resume {self.url} --dir NEW`.",
        )

    def append(self, entry: Owner | Commit) -> bool:
        """Creates the entry; False where its number is taken. An entry of the same content is the own one, whose
        answer got lost."""
        path, data = entry_path(entry.number), _encode(entry)
        return self.store.create_exclusive(path, data) or self.store.try_read(path) == data

    def fenced(self, owner: Owner | None) -> FencedError:
        """The error for whoever has lost the mirror to `owner`."""
        by = f"{owner.by}, {_utc(owner.unix_s)}" if owner else "another process"
        return FencedError(
            f"{self.url}: the run was taken over ({by}), this process may commit nothing more there.",
            "Stop this process; the newer one continues the run.",
        )

    def manifest(self, commit: Commit) -> dict[str, File]:
        """The files of a commit by their names in the run folder. Raises `CheckpointError` if that list is missing or
        damaged."""
        data = self.store.try_read(commit.manifest)
        if data is None:
            raise CheckpointError(f"{self.store.url_of(commit.manifest)} is missing.")
        if zlib.crc32(data) != commit.crc32:
            raise CheckpointError(f"{self.store.url_of(commit.manifest)} is damaged.")
        return {name: File(**fields) for name, fields in json.loads(data).items()}


def entry_path(number: int) -> str:
    """Where an entry stands, relative to the mirror."""
    return f"{LOG}/{number:08d}"


def data_folder(owner: int, attempt: int) -> str:
    """Where an owner uploads the files of one attempt at a commit."""
    return f"{DATA}/{owner:08d}/{attempt:08d}"


def owner_of(path: str) -> int:
    """Whose an object below `data` is; the path is relative to the mirror."""
    head = path.split("/")[1]
    return int(head) if head.isdecimal() else 0


def encode_manifest(files: Mapping[str, File]) -> bytes:
    """What `Mirror.manifest` reads; its format is that of the entry that names it."""
    return json.dumps({name: dataclasses.asdict(file) for name, file in files.items()}, indent=1).encode()


def new_id() -> str:
    """Names a run folder among all that ever were."""
    return secrets.token_hex(8)


def _encode(entry: Owner | Commit) -> bytes:
    kind = type(entry).__name__.lower()
    body = {"format": FORMAT, "kind": kind, **dataclasses.asdict(entry)}
    return json.dumps({**body, "crc": zlib.crc32(_canonical(body))}, indent=1).encode()


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def _decode(number: int, data: bytes, url: str) -> Entry:
    try:
        body = json.loads(data)
        damaged = body.pop("crc") != zlib.crc32(_canonical(body))
    except (ValueError, KeyError, TypeError, AttributeError):
        damaged = True
    if damaged:
        return Unreadable(number=number, reason="it is damaged")
    if (written := body.pop("format")) != FORMAT:
        raise DataError(
            f"{url}: mirror format {written}, this version reads {FORMAT}.",
            "Use the version of Treadle that wrote it.",
        )
    return {"owner": Owner, "commit": Commit}[body.pop("kind")](**body)


def _utc(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix_s))
