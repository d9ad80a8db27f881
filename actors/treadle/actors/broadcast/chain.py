"""Buckets along chains of engines: everybody passes on what it has while it receives the rest.

The learner sends everything once or little more, however many engines there are (`chain_plan`). A version is cut into
chunks, each with its checksum in the ticket; chunks are passed on as soon as they are right. An engine whose parent
dies, freezes or sends damaged chunks tells the source and gets another parent for what is missing; when no way is left
within the deadline, it has nothing and keeps its version. Every version has a random key, without which nobody is
served (`chain_wire`), and everything listens on one address of the cluster's network.

consumes: a ticket; waits for: parents, then chunks; unblocked by: the source, its parents, the deadline; produces: the
buckets, and the same chunks for its own children until everybody has them.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import ray.util
from numpy.typing import NDArray

from treadle.actors.broadcast.chain_node import Holding, Node, Pace, unlimited
from treadle.actors.broadcast.chain_receive import Receiving
from treadle.actors.broadcast.chain_tracker import Tracker
from treadle.actors.broadcast.chain_wire import SERIAL_BYTES, Address
from treadle.platform.errors import BroadcastError, DeadlineError
from treadle.platform.records import WeightManifest

ROTATIONS = 2
"""Chains a version travels along at once. More of them share each link, and slow a chunk's way through all nodes."""
_LEAST_CHUNK_BYTES, _MOST_CHUNK_BYTES = 64 * 2**10, 4 * 2**20
_CHUNKS = 1024
"""Of a version, where the bounds allow: a chunk's way through all nodes is then a small part of the whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainTicket:
    """Where the source listens, what a version is cut into, and the key to it."""

    step: int
    serial: bytes
    source: Address
    sizes_bytes: tuple[int, ...]
    chunk_bytes: int
    chunk_crc32: tuple[int, ...]
    rotations: int
    key: bytes = field(repr=False)
    transport: str = "chain"


class ChainTransport:
    """Sends the newest version of this process, whole and as deltas; receives and passes on. `host` is this node's
    address for others (default: the one Ray knows); `pace_out` and `pace_in` limit what the process sends and reads."""

    _sources: ClassVar[dict[str, Node]] = {}  # by address
    _speeds: ClassVar[dict[str, float]] = {}  # of links, in bytes per second, by address
    _offered: ClassVar[dict[str, tuple[str, bytes]]] = {}  # by base: the version's digest, and its serial
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, host: str = "", pace_out: Pace = unlimited, pace_in: Pace = unlimited) -> None:
        self._host = host
        self._pace_out, self._pace_in = pace_out, pace_in

    def send(self, manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]]) -> ChainTicket:
        node = self._source()
        total = sum(len(bucket) for bucket in buckets)
        chunk_bytes = min(max(total // _CHUNKS, _LEAST_CHUNK_BYTES), _MOST_CHUNK_BYTES)
        holding = Holding(buckets, chunk_bytes, key=secrets.token_bytes(32))
        rotations = max(1, min(ROTATIONS, len(holding.chunks)))
        holding.control = Tracker(node.address, rotations, self._speeds).talk
        serial = secrets.token_bytes(SERIAL_BYTES)
        ticket = ChainTicket(
            step=manifest.version.step,
            serial=serial,
            source=node.address,
            sizes_bytes=tuple(len(bucket) for bucket in buckets),
            chunk_bytes=chunk_bytes,
            chunk_crc32=holding.checksums(),
            rotations=rotations,
            key=holding.key,
        )
        node.hold(serial, holding)
        self._replace(node, manifest, serial)
        return ticket

    def receive(self, ticket: object, deadline_s: float) -> list[NDArray[np.uint8]]:
        """Fresh arrays of this process. Raises `DeadlineError`, or `BroadcastError` when the source is gone or has a
        newer version by now."""
        if not isinstance(ticket, ChainTicket):
            raise BroadcastError(f"broadcast.receive: {type(ticket).__name__} is no chain ticket.")
        deadline = time.monotonic() + deadline_s
        arrays = [np.empty(size, dtype=np.uint8) for size in ticket.sizes_bytes]
        holding = Holding(arrays, ticket.chunk_bytes, ticket.key)
        relay = Node(self._address(), self._pace_out)
        relay.hold(ticket.serial, holding)
        where = f"{ticket.source[0]}:{ticket.source[1]}"
        try:
            Receiving(relay, holding, ticket, self._pace_in).run(deadline)
        except TimeoutError as error:
            raise DeadlineError(
                f"broadcast.receive: version {ticket.step} did not arrive within {deadline_s:g} s from {where}.",
                "Raise broadcast.stage_deadline_s, or look for a slow link or a frozen learner.",
            ) from error
        except OSError as error:
            raise BroadcastError(
                f"broadcast.receive: version {ticket.step} cannot be fetched from {where}: {error}.",
                "Publish again from the living learner.",
            ) from error
        return arrays

    def _address(self) -> str:
        return self._host or str(ray.util.get_node_ip_address())

    def _source(self) -> Node:
        """This process's one node that serves what it published."""
        host = self._address()
        with self._lock:
            if host not in self._sources:
                self._sources[host] = Node(host, self._pace_out)
            return self._sources[host]

    def _replace(self, node: Node, manifest: WeightManifest, serial: bytes) -> None:
        """Stops serving other versions, and this one from the same base."""
        digest = manifest.version.digest
        base = "" if manifest.base is None else manifest.base.digest
        with self._lock:
            for other, (version, old) in list(self._offered.items()):
                if version != digest or other == base:
                    node.drop(old)
                    del self._offered[other]
            self._offered[base] = (digest, serial)
