"""A version's bytes as objects behind a URL, and the patience that reading and writing them takes.

A version is cut into pieces, an object each; none reaches across two buckets. A manifest with the checksum of every
piece is created last, and exclusively: only that makes a folder of objects a version.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from treadle.platform.errors import StorageError
from treadle.platform.storage import Store, open_store

MANIFEST = "manifest.json"
PIECE_BYTES = 16 * 2**20
"""A piece that arrives damaged is all that is fetched again."""
LANES = 8
"""Requests at a time: one alone fills no long link."""
DAMAGES = 4
"""How often a piece may be missing or wrong before its version is given up: what lies damaged in a bucket stays so."""
_DAMAGE = ("FlexibleChecksumError", "ClientPayloadError")
"""What S3's own client calls a body that is wrong, or cut short; neither library is loaded where there is no S3."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class DamagedError(StorageError):
    """An object that is not what its manifest says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """What a version's folder holds. Piece p is the p-th run of at most `piece_bytes` of the buckets one after the
    other. `base` is the digest of the weights that a delta starts from; version and base are named for people."""

    step: int
    digest: str
    base: str
    bucket_bytes: tuple[int, ...]
    piece_bytes: int
    piece_crc32: tuple[int, ...]

    def encode(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Pieces:
        said = json.loads(data)
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in said.items()}
        return cls(**fields)


def places(bucket_bytes: Sequence[int], piece_bytes: int) -> list[tuple[int, int, int]]:
    """Of every piece its bucket, and where it starts and stops there."""
    return [
        (bucket, start, min(start + piece_bytes, size))
        for bucket, size in enumerate(bucket_bytes)
        for start in range(0, size, piece_bytes)
    ]


def piece(folder: str, index: int) -> str:
    """The path of a piece."""
    return f"{folder}/{index:08d}"


@functools.lru_cache(maxsize=16)
def opened(url: str, timeout_s: float) -> Store:
    """This process's connection to a URL: a thread pool's every thread would have one of its own."""
    return open_store(url, read_timeout_s=timeout_s)


def patiently(ask: Callable[[], _Result], until: float) -> _Result:
    """The answer of a request that is made again while the storage fails.

    Raises `TimeoutError` with the last failure when there is no time for another attempt, `StorageError` for what will
    not pass: access denied, a bucket that does not exist, an object that is missing or damaged `DAMAGES` times.
    """
    pause_s, damages = FIRST_PAUSE_S, 0
    while True:
        try:
            return ask()
        except StorageError as error:
            damages += isinstance(error, DamagedError) or type(error.__cause__).__name__ in _DAMAGE
            if damages >= DAMAGES or isinstance(error.__cause__, PermissionError | FileNotFoundError):
                raise
            if time.monotonic() + pause_s >= until:
                raise TimeoutError(error.message) from error
            _log.warning("broadcast: %s Trying again.", error.message)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def read(store: Store, path: str, size: int, is_right: Callable[[bytes], bool]) -> bytes:
    """An object's bytes. Raises `DamagedError` for one that is missing, of another size, or wrong."""
    data = store.try_read(path)
    if data is None:
        raise DamagedError(f"{store.url_of(path)} is missing.")
    if len(data) != size:
        raise DamagedError(f"{store.url_of(path)} has {len(data)} bytes instead of {size}.")
    if not is_right(data):
        raise DamagedError(f"{store.url_of(path)} fails its CRC-32.")
    return data


def create(store: Store, path: str, data: bytes) -> None:
    """Creates an object that is nobody's yet; one with the same content is the own one, whose answer got lost."""
    if not store.create_exclusive(path, data) and store.try_read(path) != data:
        raise DamagedError(f"{store.url_of(path)} was written by somebody else.")


def each(
    work: Callable[[_Item], None], items: Iterable[_Item], until: float, name: Callable[[_Item], str]
) -> None:
    """Does `work` with every item, `LANES` at a time. Raises the first error, or at `until` a `TimeoutError` with the
    name of an item that is not done. Work that hangs is left behind in its thread, which ends with its request."""
    _Crowd(work, items).run(until, name)


class _Crowd(Generic[_Item]):
    """consumes: items; waits for: their work; unblocked by: the last one, an error, the deadline; produces: nothing."""

    def __init__(self, work: Callable[[_Item], None], items: Iterable[_Item]) -> None:
        self._work = work
        self._todo = deque(items)
        self._running: list[_Item] = []
        self._error: Exception | None = None
        self._changed = threading.Condition()

    def run(self, until: float, name: Callable[[_Item], str]) -> None:
        for _ in range(min(LANES, len(self._todo))):
            threading.Thread(target=self._lane, name="weights-lane", daemon=True).start()
        with self._changed:
            self._changed.wait_for(self._settled, max(0.0, until - time.monotonic()))
            late = [*self._running, *self._todo]
            self._todo.clear()
            if self._error is not None:
                raise self._error
            if late:
                raise TimeoutError(f"no answer about {name(late[0])}.")

    def _settled(self) -> bool:
        return self._error is not None or not (self._todo or self._running)

    def _lane(self) -> None:
        while True:
            with self._changed:
                if not self._todo:
                    return
                item = self._todo.popleft()
                self._running.append(item)
            error = self._failure(item)
            with self._changed:
                self._running.remove(item)
                self._error = self._error or error
                self._changed.notify_all()
                if error is not None:
                    return

    def _failure(self, item: _Item) -> Exception | None:
        try:
            self._work(item)
        except Exception as error:  # noqa: BLE001  raised again by the one who waits
            return error
        return None
