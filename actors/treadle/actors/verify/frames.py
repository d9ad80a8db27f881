"""What the pool and its processes say to each other: length-prefixed JSON, and one page of shared memory.

JSON because what comes back is not to be unpickled. Shared memory because "now at sample 5" must be known at
the moment of a kill and must cost no system call.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treadle.platform.records import Json

HEADER = struct.Struct(">I")
MAX_REPLY_BYTES = 2**20
"""A process that announces more is broken."""
MAX_DETAIL_CHARACTERS = 500
MAX_PACKET_BYTES = 2**17
"""What goes to a fork server and back at a time; below the default buffer of a socket."""
_BEGAN_S = struct.Struct("=d")
_INDEX = struct.Struct("=q")
_STOP = struct.Struct("=q")
_STOP_AT = _BEGAN_S.size + _INDEX.size


def encode(message: Json) -> bytes:
    """The frame of a message. Raises `ValueError` for what JSON cannot hold (an integer of 5,000 digits)."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    return HEADER.pack(len(body)) + body


class Channel:
    """The process's side: blocking, on one socket."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def receive(self) -> dict[str, Json] | None:
        """The next message, or None when the pool closed its end."""
        header = self._exactly(HEADER.size)
        body = self._exactly(HEADER.unpack(header)[0]) if header else b""
        if not body:
            return None
        message = json.loads(body)
        return message if isinstance(message, dict) else None

    def send(self, message: Json) -> None:
        frame = memoryview(encode(message))
        while frame:
            frame = frame[os.write(self._fd, frame) :]

    def _exactly(self, n: int) -> bytes:
        chunks: list[bytes] = []
        while n:
            chunk = os.read(self._fd, min(n, 2**20))
            if not chunk:
                return b""
            chunks.append(chunk)
            n -= len(chunk)
        return b"".join(chunks)


class Progress:
    """Which sample a process works on and since when (`time.monotonic`, one clock for all processes); and, in the
    other direction, before which sample it is to end its batch because the rest is judged elsewhere."""

    IDLE = -1
    NEVER = 2**62

    def __init__(self, fd: int) -> None:
        self._page = mmap.mmap(fd, mmap.PAGESIZE)

    @classmethod
    def create(cls) -> tuple[Progress, int]:
        """A fresh page, idle, and the descriptor by which a process opens it."""
        fd = os.memfd_create("verify-progress")
        os.ftruncate(fd, mmap.PAGESIZE)
        progress = cls(fd)
        progress.start(cls.IDLE, 0.0)
        progress.stop_before(cls.NEVER)
        return progress, fd

    def start(self, index: int, began_s: float) -> None:
        """The time is written first: a reader that sees the new index also sees the new time."""
        _BEGAN_S.pack_into(self._page, 0, began_s)
        _INDEX.pack_into(self._page, _BEGAN_S.size, index)

    def read(self) -> tuple[int, float]:
        """Index (`IDLE` between batches) and start time."""
        index = int(_INDEX.unpack_from(self._page, _BEGAN_S.size)[0])
        return index, float(_BEGAN_S.unpack_from(self._page, 0)[0])

    def stop_before(self, index: int) -> None:
        """The process begins no sample from this one on."""
        _STOP.pack_into(self._page, _STOP_AT, index)

    def stops_at(self, index: int) -> bool:
        return index >= int(_STOP.unpack_from(self._page, _STOP_AT)[0])

    def close(self) -> None:
        self._page.close()
