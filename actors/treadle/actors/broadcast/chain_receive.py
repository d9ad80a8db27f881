"""One version on its way into this process: a thread per group of chunks, one that listens to the source."""

from __future__ import annotations

import logging
import socket
import threading
import time
import zlib
from typing import Protocol

from treadle.actors.broadcast.chain_node import SILENCE_S, Holding, Node, Pace
from treadle.actors.broadcast.chain_wire import (
    CHUNKS,
    CONTROL,
    HEARTBEAT,
    Address,
    ChainError,
    dial,
    hang_up,
    read_frame,
    read_into,
    read_message,
    send_message,
)

_log = logging.getLogger(__name__)

_REPORT_S = 0.25
_ANOTHER_PARENT_S = 0.5
"""How long the source may take to name one in the place of a parent that was lost."""
_FAILURES = 10
"""Of a group at the source itself: it sends nothing right any more."""
_LEAST_BYTES = 256 * 2**10
"""A link's speed is not known before it has carried this much."""
_AFTERWARDS_S = 600.0
"""How long this process serves others at most, once it has everything."""


class Ticket(Protocol):
    """What is needed of the transport's ticket."""

    @property
    def serial(self) -> bytes: ...

    @property
    def source(self) -> Address: ...

    @property
    def chunk_crc32(self) -> tuple[int, ...]: ...

    @property
    def rotations(self) -> int: ...

    @property
    def key(self) -> bytes: ...


class Receiving:
    """Fills a holding that `node` serves. `run` returns when everything is there; the node goes on serving it to
    children until the source says that everybody has it, and is closed then."""

    def __init__(self, node: Node, holding: Holding, ticket: Ticket, pace: Pace) -> None:
        self._node, self._holding, self._ticket, self._pace = node, holding, ticket, pace
        self._parents: tuple[Address, ...] = ()
        self._error: OSError | None = None
        self._over = False
        self._carried: dict[Address, tuple[int, float]] = {}  # bytes and seconds of each parent's link
        self._changed = threading.Condition()
        self._saying = threading.Lock()
        self._line: socket.socket | None = None

    def run(self, deadline: float) -> None:
        """Raises `TimeoutError` at the deadline, other `OSError`s when there is no way left."""
        try:
            self._line = line = self._dial(self._ticket.source, CONTROL, deadline - time.monotonic())
            send_message(line, {"join": self._node.address})
            line.settimeout(max(0.0, deadline - time.monotonic()) + _AFTERWARDS_S)
            threading.Thread(target=self._listen, args=(line,), name="chain-control", daemon=True).start()
            for group in range(self._ticket.rotations):
                threading.Thread(
                    target=self._receive, args=(group, deadline), name=f"chain-group-{group}", daemon=True
                ).start()
            self._wait(deadline)
        except BaseException:
            self._end()
            raise
        self._say({"done": True})

    def _wait(self, deadline: float) -> None:
        while not self._holding.complete:
            with self._changed:
                self._changed.wait_for(self._settled, min(_REPORT_S, max(0.0, deadline - time.monotonic())))
                if self._error is not None:
                    raise self._error
                rates = [
                    [p, size / s] for p, (size, s) in self._carried.items() if size >= _LEAST_BYTES and s > 0
                ]
            if time.monotonic() >= deadline:
                raise TimeoutError
            if rates:
                self._say({"rates": rates})

    def _settled(self) -> bool:
        return self._error is not None or self._holding.complete

    def _listen(self, line: socket.socket) -> None:
        """The source's words, and the end of the service."""
        try:
            while not (message := read_message(line)).get("release"):
                parents = message.get("parents")
                if not isinstance(parents, list) or len(parents) != self._ticket.rotations:
                    raise ChainError("the source named no parents")
                with self._changed:
                    self._parents = tuple((str(host), int(port)) for host, port in parents)
                    self._changed.notify_all()
        except OSError as error:
            self._fail(ChainError(f"the source has left ({error})"))
        finally:
            self._end()

    def _receive(self, group: int, deadline: float) -> None:
        """All chunks of one group, from one parent after the other if need be."""
        failures = 0
        while not self._over and (missing := self._holding.missing(group, self._ticket.rotations)):
            parent = self._parent_of(group, deadline)
            if parent is None:
                return
            try:
                self._pull(parent, group, missing, deadline)
            except OSError as error:
                _log.info("chain: parent %s:%d is lost: %s", *parent, error)
                failures += parent == self._ticket.source
                if failures > _FAILURES:
                    self._fail(ChainError(f"{failures} attempts at the source failed, the last: {error}"))
                    return
                self._lose(group, parent)
        with self._changed:
            self._changed.notify_all()

    def _parent_of(self, group: int, deadline: float) -> Address | None:
        with self._changed:
            self._changed.wait_for(lambda: self._parents or self._over, max(0.0, deadline - time.monotonic()))
            return None if self._over or not self._parents else self._parents[group]

    def _lose(self, group: int, parent: Address) -> None:
        """Tells the source, and waits a moment for another parent."""
        self._say({"lost": parent})
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._parents[group] != parent, _ANOTHER_PARENT_S)

    def _pull(self, parent: Address, group: int, missing: list[int], deadline: float) -> None:
        """Chunks from one parent, until they are there or another parent is named."""
        with self._dial(parent, CHUNKS, min(SILENCE_S, deadline - time.monotonic())) as line:
            send_message(line, {"chunks": missing})
            line.settimeout(SILENCE_S)
            last = time.monotonic()
            for index in missing:
                frame = read_frame(line)
                while frame.index == HEARTBEAT:
                    if self._over or self._parents[group] != parent:
                        return
                    frame = read_frame(line)
                place = self._holding.view(index)
                if frame.index != index or frame.size != len(place):
                    raise ChainError(f"chunk {frame.index} of {frame.size} bytes came instead of {index}")
                read_into(line, place, self._pace)
                if zlib.crc32(place) != self._ticket.chunk_crc32[index]:
                    raise ChainError(f"chunk {index} fails its checksum")
                now = time.monotonic()
                self._took(parent, frame.size, now - last - frame.waited_s)
                last = now
                self._holding.arrived(index)
                if self._over or self._parents[group] != parent:
                    break

    def _took(self, parent: Address, size: int, seconds: float) -> None:
        with self._changed:
            bytes_before, seconds_before = self._carried.get(parent, (0, 0.0))
            self._carried[parent] = (bytes_before + size, seconds_before + max(seconds, 1e-6))

    def _dial(self, address: Address, purpose: bytes, timeout_s: float) -> socket.socket:
        own, ticket = self._node.address[0], self._ticket
        return dial(address, own, ticket.serial, ticket.key, purpose, max(timeout_s, 1e-3))

    def _say(self, message: object) -> None:
        """To the source; when it has left, the listening thread notices."""
        line = self._line
        if line is not None:
            try:
                with self._saying:
                    send_message(line, message)
            except OSError as error:
                _log.debug("chain: the source does not listen: %s", error)

    def _fail(self, error: OSError) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _end(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        if self._line is not None:
            hang_up(self._line)
        self._node.close()
