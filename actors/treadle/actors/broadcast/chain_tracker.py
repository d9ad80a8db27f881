"""The source's side of a chained version: who receives it, who is slow or lost, and who therefore sends to whom."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping

from treadle.actors.broadcast.chain_plan import Plan
from treadle.actors.broadcast.chain_wire import Address, ChainError, read_message, send_message

QUIET_S = 0.05
"""Engines are asked at once: the first plan is made when nobody has joined for this long,"""
PATIENCE_S = 0.5
"""or the first has waited for this long. Who comes later goes behind."""
_SILENT_S = 900.0
"""A member reports what it receives several times a second, and hardly anything afterwards."""


class Tracker:
    """Talks to the members of one version, one thread each. `speeds` outlives it: what was measured helps the next
    version's plan.

    consumes: joins, measured speeds, lost parents; waits for: the next message of a member; unblocked by: it, or its
    end; produces: to each member its parents, whenever they change, and "release" when all have everything.
    """

    def __init__(self, source: Address, rotations: int, speeds: dict[str, float]) -> None:
        self._plan = Plan(source=source, rotations=rotations)
        self._speeds = speeds
        self._lines: dict[Address, socket.socket] = {}
        self._told: dict[Address, tuple[Address, ...]] = {}
        self._changed = threading.Condition()
        self._first_s = self._last_s = 0.0
        self._planned = False

    def talk(self, line: socket.socket) -> None:
        """One member's connection, until it ends."""
        line.settimeout(10.0)
        address = _address(read_message(line).get("join"))
        self._join(address, line)
        try:
            line.settimeout(_SILENT_S)
            while True:
                self._heard(address, read_message(line))
        finally:
            self._left(address)

    def _join(self, address: Address, line: socket.socket) -> None:
        with self._changed:
            now = time.monotonic()
            self._first_s, self._last_s = self._first_s or now, now
            self._plan.join(address, self._speeds.get(address[0], 0.0))
            self._lines[address] = line
            self._changed.notify_all()
            while not self._planned:
                quiet_s = min(self._last_s + QUIET_S, self._first_s + PATIENCE_S) - time.monotonic()
                if quiet_s <= 0:
                    self._planned = True
                    self._changed.notify_all()
                    break
                self._changed.wait(quiet_s)
            self._tell()

    def _heard(self, address: Address, message: Mapping[str, object]) -> None:
        with self._changed:
            lost, rates = message.get("lost"), message.get("rates")
            if lost is not None and (parent := self._plan.members.get(_address(lost))) is not None:
                parent.avoided = True
            if isinstance(rates, list):
                self._plan.told(address, {_address(end): float(rate) for end, rate in rates})
                self._speeds.update({m.address[0]: m.rate for m in self._plan.members.values() if m.rate})
            if message.get("done"):
                self._plan.members[address].done = True
            self._tell()

    def _left(self, address: Address) -> None:
        with self._changed:
            self._plan.members[address].gone = True
            self._lines.pop(address, None)
            self._tell()

    def _tell(self) -> None:
        """To everybody whose parents are new; a member that cannot be reached will be noticed to have left."""
        if not self._planned:
            return
        finished = self._plan.finished
        parents = self._plan.parents()
        for address, line in list(self._lines.items()):
            if not finished and self._told.get(address) == parents[address]:
                continue
            self._told[address] = parents[address]
            try:
                send_message(line, {"release": True} if finished else {"parents": parents[address]})
            except OSError:
                del self._lines[address]
                continue
            if finished:
                self._plan.members[address].gone = True
                del self._lines[address]


def _address(value: object) -> Address:
    if (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
    ):
        return value[0], value[1]
    raise ChainError("a message without an address")
