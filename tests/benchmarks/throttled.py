"""Engines as processes behind links of one speed, for the benchmark of publications.

Every process has its own address of the machine's own network, sends no faster than its link, and reads no faster:
what the chains make of the links is measured, and not the machine.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treadle.actors.broadcast.buckets import check, unpack
from treadle.actors.broadcast.chain import ChainTransport
from treadle.kernels.digest import state_digest
from treadle.platform.errors import BroadcastError
from treadle.platform.records import WeightManifest

SOURCE = "127.0.4.1"
DEADLINE_S = 120.0
_READY_S = 180.0


class Link:
    """Carries so many bytes per second, and takes note of them."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate, self._free, self._lock = bytes_per_s, 0.0, threading.Lock()
        self.carried = 0

    def __call__(self, count: int) -> None:
        with self._lock:
            self.carried += count
            self._free = max(self._free, time.monotonic()) + count / self._rate
            wait_s = self._free - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """How a receiver fared: seconds, the digest of what it holds, and why it holds nothing new."""

    receiver: int
    wall_s: float
    digest: str = ""
    failure: str = ""


def serve(receiver: int, bytes_per_s: float, orders: Any, answers: Any) -> None:
    """A receiver's process: fetches what it is ordered to, by chain or straight from the source."""
    transport = ChainTransport(
        host=f"127.0.5.{receiver + 1}", pace_out=Link(bytes_per_s), pace_in=Link(bytes_per_s)
    )
    pace = Link(bytes_per_s)
    answers.put("ready")
    while (order := orders.get()) is not None:
        manifest, ticket = order
        began = time.monotonic()
        try:
            if isinstance(ticket, int):
                buckets = fetch_alone(manifest, ticket, pace)
            else:
                buckets = transport.receive(ticket, DEADLINE_S)
            wall_s = time.monotonic() - began
            check(manifest, buckets)
            digest = state_digest(unpack(manifest, buckets))
            answers.put(Finish(receiver=receiver, wall_s=wall_s, digest=digest))
        except BroadcastError as error:
            wall_s = time.monotonic() - began
            answers.put(Finish(receiver=receiver, wall_s=wall_s, failure=error.message))


class Receivers:
    """`rates` are the speeds of the receivers' links, in bytes per second."""

    def __init__(self, rates: Sequence[float]) -> None:
        context = multiprocessing.get_context("spawn")
        self._answers = context.Queue()
        self._orders = [context.Queue() for _ in rates]
        self._processes = [
            context.Process(target=serve, args=(i, rate, self._orders[i], self._answers), daemon=True)
            for i, rate in enumerate(rates)
        ]
        for process in self._processes:
            process.start()
        for _ in rates:
            self._answers.get(timeout=_READY_S)

    def fetch(self, manifest: WeightManifest, ticket: object) -> None:
        """Orders all of them to fetch, at once."""
        for orders, process in zip(self._orders, self._processes, strict=True):
            if process.is_alive():
                orders.put((manifest, ticket))

    def finishes(self, count: int) -> list[Finish]:
        """The answers of `count` receivers, in order of their number."""
        found = [self._answers.get(timeout=DEADLINE_S + 30) for _ in range(count)]
        return sorted(found, key=lambda finish: finish.receiver)

    def kill(self, receiver: int) -> None:
        self._processes[receiver].kill()

    def close(self) -> None:
        for orders, process in zip(self._orders, self._processes, strict=True):
            orders.put(None)
            process.join(timeout=20)
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def alone(buckets: Sequence[NDArray[np.uint8]], link: Link) -> Iterator[int]:
    """A source that sends everything to everybody who connects, all over one link: the port."""
    listener = socket.create_server((SOURCE, 0), backlog=64)

    def send(line: socket.socket) -> None:
        with line:
            for bucket in buckets:
                for start in range(0, len(bucket), 65_536):
                    piece = bucket.data[start : start + 65_536]
                    link(len(piece))
                    line.sendall(piece)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                line, _ = listener.accept()
                threading.Thread(target=send, args=(line,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def fetch_alone(manifest: WeightManifest, port: int, pace: Link) -> list[NDArray[np.uint8]]:
    """All buckets from the source that serves everybody."""
    buckets = [np.empty(size, np.uint8) for size in manifest.bucket_bytes]
    with socket.create_connection((SOURCE, port), timeout=DEADLINE_S) as line:
        for bucket in buckets:
            place = bucket.data
            while place:
                count = line.recv_into(place)
                if not count:
                    raise BroadcastError("the source left")
                pace(count)
                place = place[count:]
    return buckets
