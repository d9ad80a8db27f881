"""Buckets through gloo: straight from the learner's memory into the engine's, without the object store.

Every fetch is a process group of its own with two members, met through a TCP store in the sending process. A
dead or frozen engine can therefore hold up nobody but the thread that serves it, and that one only until its
deadline; nobody has to be known in advance. Meeting costs some milliseconds, which large models do not
notice.

Neither gloo nor the store checks who connects: both listen on one address of the cluster's private network.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import ray.util
import torch
import torch.distributed
from numpy.typing import NDArray

from treadle.platform.errors import BroadcastError, DeadlineError
from treadle.platform.records import WeightManifest

_SENDER, _RECEIVER = 0, 1
_FOREVER = timedelta(days=3650)
_c10d: Any = torch.distributed  # torch's stubs know neither the stores' queues nor gloo's send and recv
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class GlooTicket:
    """Where to meet the sender, and what it will send. `serial` tells its sends apart."""

    step: int
    serial: int
    host: str
    port: int
    sizes_bytes: tuple[int, ...]
    transport: str = "gloo"


class GlooTransport:
    """Sends the newest version of this process, whole and as deltas; an older ticket is refused. `host` is this
    node's address for engines (default: the one Ray knows), `serve_timeout_s` bounds what a frozen engine can hold
    up."""

    def __init__(self, host: str = "", serve_timeout_s: float = 300.0) -> None:
        self._host = host
        self._serve_timeout_s = serve_timeout_s

    def send(self, manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]]) -> GlooTicket:
        door = _Door.of(self._host or ray.util.get_node_ip_address(), self._serve_timeout_s)
        return GlooTicket(
            step=manifest.version.step,
            serial=door.offer(manifest, buckets),
            host=door.host,
            port=door.port,
            sizes_bytes=tuple(len(bucket) for bucket in buckets),
        )

    def receive(self, ticket: object, deadline_s: float) -> list[NDArray[np.uint8]]:
        """Fresh arrays of this process. Raises `DeadlineError`, or `BroadcastError` when the sender is gone
        or has a newer version by now."""
        if not isinstance(ticket, GlooTicket):
            raise BroadcastError(f"broadcast.receive: {type(ticket).__name__} is no gloo ticket.")
        deadline = time.monotonic() + deadline_s
        try:
            return _in_time(lambda: _fetch(ticket, deadline), deadline)
        except (RuntimeError, OSError) as error:
            if time.monotonic() >= deadline or isinstance(error, TimeoutError):
                raise DeadlineError(
                    f"broadcast.receive: version {ticket.step} did not arrive within {deadline_s:g} s "
                    f"from {ticket.host}:{ticket.port}.",
                    "Raise broadcast.stage_deadline_s, or look for a slow link or a frozen learner.",
                ) from error
            raise BroadcastError(
                f"broadcast.receive: version {ticket.step} cannot be fetched from "
                f"{ticket.host}:{ticket.port}: {str(error).splitlines()[0]}.",
                "Publish again from the living learner.",
            ) from error


def _in_time(fetch: Callable[[], _Result], deadline: float) -> _Result:
    """The store's own time-out does not hold: against a frozen peer that accepts connections, its first read
    waits for ever (torch 2.13). The thread it is left with ends when the peer does.

    Raises `TimeoutError` at the deadline, or what `fetch` raises.
    """
    result: Future[_Result] = Future()

    def run() -> None:
        try:
            result.set_result(fetch())
        except Exception as error:  # noqa: BLE001  raised again by the one who waits
            result.set_exception(error)

    threading.Thread(target=run, name="gloo-fetch", daemon=True).start()
    return result.result(max(deadline - time.monotonic(), 1e-3))


def _fetch(ticket: GlooTicket, deadline: float) -> list[NDArray[np.uint8]]:
    def left() -> timedelta:
        return timedelta(seconds=max(deadline - time.monotonic(), 1e-3))

    # A plain socket says at once, and in one line, that nobody listens; the store would try again and again.
    with socket.create_connection((ticket.host, ticket.port), left().total_seconds()) as knock:
        own_host = knock.getsockname()[0]
    lines = _Lines.to(ticket.host, ticket.port)
    store = lines.take(left())
    buckets = _fetch_through(store, ticket, own_host, left)
    lines.give_back(store)
    return buckets


def _fetch_through(
    store: Any, ticket: GlooTicket, own_host: str, left: Callable[[], timedelta]
) -> list[NDArray[np.uint8]]:
    meeting = f"{own_host}-{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}"
    store.queue_push("fetches", f"{meeting} {ticket.serial}")
    answer = store.get(f"{meeting}/answer").decode()
    if answer != "coming":
        raise BroadcastError(
            f"broadcast.receive: version {ticket.step}: {answer}", "Fetch the newest version."
        )
    group = _meet(store, meeting, _RECEIVER, own_host, left())
    buckets = [np.empty(size, dtype=np.uint8) for size in ticket.sizes_bytes]
    for tag, bucket in enumerate(buckets):
        if len(bucket):
            group.recv([torch.from_numpy(bucket)], _SENDER, tag).wait(left())
    return buckets


def _meet(store: Any, meeting: str, rank: int, host: str, timeout: timedelta) -> Any:
    options = _c10d.ProcessGroupGloo._Options()
    options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    options._threads = 1
    return _c10d.ProcessGroupGloo(_c10d.PrefixStore(meeting, store), rank, 2, options)


class _Lines:
    """Connections to a store, kept for the next fetch: torch asks the name service for the other side's name whenever
    it opens one, and a slow answer (5 s and more) would hold up the weights. One that failed is not given back."""

    _all: ClassVar[dict[tuple[str, int], _Lines]] = {}

    @classmethod
    def to(cls, host: str, port: int) -> _Lines:
        """A learner that was started again listens elsewhere; what led to the old one goes."""
        if (host, port) not in cls._all:
            cls._all = {(host, port): cls(partial(_connected, host, port))}
        return cls._all[host, port]

    def __init__(self, connect: Callable[[timedelta], Any]) -> None:
        self._connect = connect
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def take(self, timeout: timedelta) -> Any:
        """A connection that nobody else uses, whose calls take at most `timeout`."""
        try:
            store = self._idle.get_nowait()
        except queue.Empty:
            return self._connect(timeout)
        store.set_timeout(timeout)
        return store

    def give_back(self, store: Any) -> None:
        self._idle.put(store)


def _connected(host: str, port: int, timeout: timedelta) -> Any:
    return _c10d.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


class _Door:
    """Where engines ask for the newest version of this process.

    consumes: fetches pushed to the store's queue; waits for: the next one; unblocked by: an engine, or
    `close`; produces: one thread per fetch, which ends with it.
    """

    _doors: ClassVar[dict[str, _Door]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def of(cls, host: str, serve_timeout_s: float) -> _Door:
        with cls._lock:
            if host not in cls._doors:
                cls._doors[host] = cls(host, timedelta(seconds=serve_timeout_s))
            return cls._doors[host]

    def __init__(self, host: str, serve_timeout: timedelta) -> None:
        listener = socket.create_server((host, 0), backlog=512)
        self.host, self.port = host, listener.getsockname()[1]
        self._serve_timeout = serve_timeout
        self._serials = itertools.count(1)
        self._version = ""  # the digest of what is served
        self._offers: dict[str, tuple[int, tuple[NDArray[np.uint8], ...]]] = {}  # by the digest of the base
        # The store closes the descriptor; binding it ourselves keeps it off the node's other networks.
        self._store = _c10d.TCPStore(
            host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=_FOREVER,
            master_listen_fd=listener.detach(),
        )
        self._lines = _Lines(partial(_connected, host, self.port))
        self._thread = threading.Thread(target=self._open, name="gloo-door", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def offer(self, manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]]) -> int:
        """Replaces what is served of other versions, and of this one from the same base; fetches under way keep what
        they have begun with."""
        serial = next(self._serials)
        offers = self._offers if manifest.version.digest == self._version else {}
        base = "" if manifest.base is None else manifest.base.digest
        self._offers = {**offers, base: (serial, tuple(buckets))}
        self._version = manifest.version.digest
        return serial

    def close(self) -> None:
        # Without this the store's threads outlive the interpreter and abort the process.
        self._store.queue_push("fetches", "")
        self._thread.join(timeout=5)

    def _open(self) -> None:
        store = self._store.clone()
        while fetch := store.queue_pop("fetches").decode():
            meeting, serial = fetch.split()
            threading.Thread(target=self._serve, args=(meeting, int(serial)), daemon=True).start()

    def _serve(self, meeting: str, wanted: int) -> None:
        buckets = dict(self._offers.values()).get(wanted)
        try:
            store = self._lines.take(self._serve_timeout)
            if buckets is None:
                store.set(f"{meeting}/answer", "the sender has published a newer version since.")
            else:
                store.set(f"{meeting}/answer", "coming")
                group = _meet(store, meeting, _SENDER, self.host, self._serve_timeout)
                for tag, bucket in enumerate(buckets):
                    if len(bucket):
                        group.send([torch.from_numpy(bucket)], _RECEIVER, tag).wait(self._serve_timeout)
            self._lines.give_back(store)
        except RuntimeError as error:
            # The engine's own deadline reports it; the sender goes on for the others.
            _log.warning("gloo: an engine left in the middle of a fetch: %s", str(error).splitlines()[0])
