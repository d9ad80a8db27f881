"""The part of the chain transport that serves: one listener per process, and the versions it can pass on."""

from __future__ import annotations

import logging
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from treadle.actors.broadcast.chain_wire import (
    CONTROL,
    HEARTBEAT,
    Address,
    ChainError,
    hang_up,
    listen,
    read_message,
    send_frame,
    welcome,
)

_log = logging.getLogger(__name__)

SILENCE_S = 3.0
"""A parent that says nothing for this long is lost: one that waits itself sends heartbeats."""
_HEARTBEAT_S = 0.5

Pace = Callable[[int], None]
"""Told of bytes that a link is about to carry or has carried; holds the caller up where the link is slower."""


def unlimited(_: int) -> None:
    """The link's own speed."""


class Holding:
    """A version's bytes in this process, complete or on their way. `key` is what callers must prove to have.

    Chunk c is the c-th run of at most `chunk_bytes` of the buckets one after the other; none reaches across two.
    """

    def __init__(self, buckets: Sequence[NDArray[np.uint8]], chunk_bytes: int, key: bytes) -> None:
        self.buckets = list(buckets)
        self.key = key
        self.chunks = [
            (at, start, min(chunk_bytes, len(bucket) - start))
            for at, bucket in enumerate(self.buckets)
            for start in range(0, len(bucket), chunk_bytes)
        ]
        self.control: Callable[[socket.socket], None] | None = None  # the source's: talks to a member
        self._have = bytearray(len(self.chunks))
        self._closed = False
        self._changed = threading.Condition()

    def checksums(self) -> tuple[int, ...]:
        """CRC-32 of every chunk; all of them must be here."""
        self._have[:] = b"\x01" * len(self._have)
        return tuple(zlib.crc32(self.view(index)) for index in range(len(self.chunks)))

    def view(self, index: int) -> memoryview:
        """The chunk's place in memory."""
        at, start, size = self.chunks[index]
        return self.buckets[at].data[start : start + size]

    def missing(self, group: int, groups: int) -> list[int]:
        return [index for index in range(group, len(self.chunks), groups) if not self._have[index]]

    @property
    def complete(self) -> bool:
        return all(self._have)

    def arrived(self, index: int) -> None:
        """The chunk is in its place, and right."""
        with self._changed:
            self._have[index] = 1
            self._changed.notify_all()

    def wait(self, index: int, timeout_s: float) -> bool:
        """Whether the chunk is here. Raises `ChainError` when nobody waits for it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._have[index] or self._closed, timeout_s)
            if self._closed:
                raise ChainError("the version was given up here")
            return bool(self._have[index])

    def close(self) -> None:
        """Nothing more will arrive, or be passed on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Node:
    """Serves chunks of what it holds, on one address of this machine.

    consumes: connections; waits for: the next one; unblocked by: a receiver, or `close`; produces: one thread per
    connection, which ends with it, or when the version is given up.
    """

    def __init__(self, host: str, pace: Pace = unlimited) -> None:
        self._listener = listen(host)
        self.address: Address = (host, self._listener.getsockname()[1])
        self._pace = pace
        self._holdings: dict[bytes, Holding] = {}
        threading.Thread(target=self._accept, name="chain-node", daemon=True).start()

    def hold(self, serial: bytes, holding: Holding) -> None:
        self._holdings = {**self._holdings, serial: holding}

    def drop(self, serial: bytes) -> None:
        """Stops serving a version; who is in the middle of it is cut off."""
        holding = self._holdings.get(serial)
        self._holdings = {other: held for other, held in self._holdings.items() if other != serial}
        if holding is not None:
            holding.close()

    def close(self) -> None:
        """Serves nobody any more."""
        hang_up(self._listener)
        for serial in list(self._holdings):
            self.drop(serial)

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(line,), name="chain-serve", daemon=True).start()

    def _key_of(self, serial: bytes) -> bytes | None:
        holding = self._holdings.get(serial)
        return None if holding is None else holding.key

    def _serve(self, line: socket.socket) -> None:
        with line:
            try:
                line.settimeout(SILENCE_S)
                serial, purpose = welcome(line, self._key_of)
                holding = self._holdings.get(serial)
                if holding is None:
                    return
                if purpose == CONTROL:
                    if holding.control is not None:
                        holding.control(line)
                else:
                    self._send_chunks(line, holding)
            except OSError as error:
                # The receiver has its own deadline and other parents; the others go on.
                _log.debug("chain: a connection ended: %s", error)

    def _send_chunks(self, line: socket.socket, holding: Holding) -> None:
        wanted = read_message(line).get("chunks")
        if not isinstance(wanted, list):
            raise ChainError("a request without chunks")
        line.settimeout(60.0)  # a slow link is its receiver's trouble, a dead one is noticed
        for index in wanted:
            if not isinstance(index, int) or not 0 <= index < len(holding.chunks):
                raise ChainError("a request for a chunk that does not exist")
            began = time.monotonic()
            while not holding.wait(index, _HEARTBEAT_S):
                send_frame(line, HEARTBEAT, memoryview(b""), 0.0)
            waited_s = time.monotonic() - began
            payload = holding.view(index)
            self._pace(len(payload))
            send_frame(line, index, payload, waited_s)
