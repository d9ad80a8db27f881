"""Chains of receivers on addresses of this machine's own network, each as a node of its own. Receivers are threads
here; the transport's contract and the benchmark run them as processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from treadle.actors.broadcast import chain, chain_receive
from treadle.actors.broadcast.buckets import check, pack
from treadle.actors.broadcast.chain import ChainTicket, ChainTransport
from treadle.actors.broadcast.chain_node import Node, Pace, unlimited
from treadle.actors.broadcast.chain_plan import Plan
from treadle.actors.broadcast.chain_wire import CHUNKS, Address, dial, read_frame, send_message
from treadle.actors.broadcast.config import BroadcastConfig
from treadle.actors.broadcast.transports import chosen
from treadle.platform.errors import BroadcastError, DeadlineError
from treadle.platform.records import WeightManifest

Buckets = list[NDArray[np.uint8]]
S: Address = ("10.0.0.1", 1)


def node(number: int, port: int = 1) -> Address:
    return (f"10.0.1.{number}", port)


def plan_of(*members: Address, rotations: int = 2) -> Plan:
    plan = Plan(source=S, rotations=rotations)
    for member in members:
        plan.join(member)
    return plan


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another parent is waited for so shortly that ten failures take no five seconds."""
    monkeypatch.setattr("treadle.actors.broadcast.chain_receive._ANOTHER_PARENT_S", 0.02)


def test_chains_begin_with_different_nodes_and_pass_every_node() -> None:
    a, b, c = node(1), node(2), node(3)
    assert plan_of(a, b, c, rotations=3).parents() == {a: (S, c, c), b: (a, S, a), c: (b, b, S)}
    assert plan_of(a, b, c, rotations=1).parents() == {a: (S,), b: (a,), c: (b,)}
    assert plan_of(a).parents() == {a: (S, S)}


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("rotations", [1, 2, 4, 7])
def test_nobody_sends_more_than_once_everything_and_everybody_is_reached(nodes: int, rotations: int) -> None:
    plan = plan_of(*(node(i) for i in range(nodes)), rotations=rotations)
    parents = plan.parents()
    for group in range(rotations):
        senders = [given[group] for given in parents.values()]
        assert len(set(senders)) == len(senders), "a chain: one child each"
        for member in parents:
            seen, at = set(), member
            while at != S:
                assert at not in seen, "a circle"
                seen.add(at)
                at = parents[at][group]


def test_of_one_node_only_the_first_is_in_the_chains_and_serves_the_others() -> None:
    a, a2, a3, b = node(1), node(1, 2), node(1, 3), node(2)
    near, near2 = (S[0], 7), (S[0], 8)
    parents = plan_of(a, a2, near, b, a3, near2).parents()
    assert parents[a2] == parents[a3] == (a, a)
    assert parents[near] == parents[near2] == (S, S)
    assert parents[a] == (S, b)
    assert parents[b] == (a, S)


def test_a_slow_link_comes_last_and_feeds_nobody() -> None:
    a, b, c, d = (node(i) for i in range(4))
    plan = plan_of(a, b, c, d)
    plan.told(b, {a: 100.0})
    assert plan.slow() == frozenset(), "two speeds are no measure"
    plan.told(c, {b: 9.0, a: 10.0})
    plan.told(d, {a: 90.0, c: 9.0})
    assert plan.slow() == {c}
    parents = plan.parents()
    assert all(c not in given for given in parents.values())
    assert parents[c] == (d, a), "the ends of both chains, who have no other child"
    plan.told(c, {d: 80.0})
    assert plan.slow() == frozenset()


def test_what_is_remembered_counts_until_something_is_measured() -> None:
    plan = Plan(source=S, rotations=1)
    for i, rate in enumerate((100.0, 5.0, 90.0, 0.0)):
        plan.join(node(i), rate)
    assert plan.slow() == {node(1)}
    plan.told(node(1), {node(0): 95.0})
    assert plan.slow() == frozenset()


def test_the_gone_and_the_avoided_send_to_nobody() -> None:
    a, b, c = node(1), node(2), node(3)
    plan = plan_of(a, b, c, rotations=1)
    plan.members[b].gone = True
    assert plan.parents() == {a: (S,), c: (a,)}
    plan.members[a].avoided = True
    assert plan.parents() == {c: (S,), a: (c,)}
    plan.members[c].avoided = True
    assert plan.parents() == {a: (S,), c: (S,)}
    assert not plan.finished
    plan.members[a].done = plan.members[c].done = True
    assert plan.finished


class Rate:
    """A link of so many bytes per second."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate, self._free, self._lock = bytes_per_s, 0.0, threading.Lock()
        self.carried = 0

    def __call__(self, count: int) -> None:
        with self._lock:
            self.carried += count
            self._free = max(self._free, time.monotonic()) + count / self._rate
            wait_s = self._free - time.monotonic()
        time.sleep(max(0.0, wait_s))


@dataclass
class Chain:
    """A source and receivers; `receive` starts all of them at once."""

    out: Pace = unlimited
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(16))

    def __post_init__(self) -> None:
        self.source = ChainTransport(host="127.0.2.1", pace_out=self.out)

    def send(self, step: int, megabytes: float = 2.0) -> tuple[WeightManifest, Buckets, ChainTicket]:
        g = torch.Generator().manual_seed(step)
        state = [(f"t{i}", torch.randn(int(megabytes * 25_000), generator=g)) for i in range(10)]
        manifest, buckets = pack(state, step, 1 << 19)
        return manifest, buckets, self.source.send(manifest, buckets)

    def receive(
        self, ticket: object, receivers: Sequence[ChainTransport], deadline_s: float = 30.0
    ) -> list[Future[Buckets]]:
        return [self.pool.submit(one.receive, ticket, deadline_s) for one in receivers]


def receivers(count: int, pace: Callable[[int], Pace] = lambda _: unlimited) -> list[ChainTransport]:
    return [ChainTransport(host=f"127.0.3.{i + 1}", pace_out=pace(i)) for i in range(count)]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources keep their pace, and remember speeds, as long as their process lives."""
    monkeypatch.setattr(ChainTransport, "_sources", {})
    monkeypatch.setattr(ChainTransport, "_speeds", {})
    monkeypatch.setattr(ChainTransport, "_offered", {})


@pytest.fixture
def relays(monkeypatch: pytest.MonkeyPatch) -> dict[str, Node]:
    """The receivers' nodes by host, as they come."""
    found: dict[str, Node] = {}

    class Seen(Node):
        def __init__(self, host: str, pace: Pace = unlimited) -> None:
            super().__init__(host, pace)
            found[host] = self

    monkeypatch.setattr(chain, "Node", Seen)
    return found


def same(received: Buckets, sent: Buckets) -> bool:
    return len(received) == len(sent) and all(map(np.array_equal, received, sent))


def test_the_source_sends_little_more_than_everything_once() -> None:
    link = Rate(1e9)
    loom = Chain(out=link)
    manifest, buckets, ticket = loom.send(1)
    for received in loom.receive(ticket, receivers(8)):
        check(manifest, received.result(40))
        assert same(received.result(), buckets)
    assert manifest.total_bytes <= link.carried < 2.5 * manifest.total_bytes, "eight times, were it alone"


def test_a_receiver_that_comes_late_is_served_too() -> None:
    loom = Chain(out=Rate(4e6))
    _, buckets, ticket = loom.send(1)
    first = loom.receive(ticket, receivers(2))
    time.sleep(0.3)
    late = loom.receive(ticket, [ChainTransport(host="127.0.3.9")])
    assert all(same(one.result(40), buckets) for one in (*first, *late))
    after = loom.receive(ticket, [ChainTransport(host="127.0.3.10")])
    assert same(after[0].result(40), buckets)


def test_a_relay_that_dies_is_replaced_for_its_children(relays: dict[str, Node]) -> None:
    loom = Chain(out=Rate(3e6))
    _, buckets, ticket = loom.send(1)
    slow = [Rate(3e6) for _ in range(4)]
    found = loom.receive(ticket, receivers(4, slow.__getitem__))
    while not slow[1].carried > 200_000:
        time.sleep(0.01)
    relays["127.0.3.2"].close()
    assert all(same(one.result(40), buckets) for one in (found[0], found[2], found[3]))


def test_a_relay_that_freezes_is_replaced_for_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts connections, and says nothing, not even that it waits."""
    monkeypatch.setattr(chain_receive, "SILENCE_S", 0.7)
    thaw = threading.Event()
    passed = threading.Semaphore(2)

    def freezing(_: int) -> None:
        if not passed.acquire(blocking=False):
            thaw.wait(30)

    loom = Chain()
    _, buckets, ticket = loom.send(1)
    found = loom.receive(ticket, receivers(3, lambda i: freezing if i == 0 else unlimited))
    try:
        assert all(same(one.result(40), buckets) for one in found)
    finally:
        thaw.set()


def test_a_relay_that_damages_chunks_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksums are the source's: what a relay spoils is fetched elsewhere."""
    spoiled = []
    original = chain_receive.read_into

    def spoiling(line: object, place: memoryview, pace: Pace) -> None:
        original(line, place, pace)  # type: ignore[arg-type]
        if line.getpeername()[0] == "127.0.3.1":  # type: ignore[attr-defined]
            place[len(place) // 2] ^= 1
            spoiled.append(len(place))

    monkeypatch.setattr(chain_receive, "read_into", spoiling)
    loom = Chain()
    manifest, buckets, ticket = loom.send(1)
    for received in loom.receive(ticket, receivers(3)):
        check(manifest, received.result(40))
        assert same(received.result(), buckets)
    assert spoiled, "nobody was served by the relay that spoils"


@pytest.mark.usefixtures("hasty")
def test_a_source_whose_bytes_do_not_fit_its_checksums_ends_the_attempt() -> None:
    loom = Chain()
    _, buckets, ticket = loom.send(1)
    buckets[0][77] ^= 1
    with pytest.raises(
        BroadcastError, match=r"version 1 cannot be fetched .* attempts at the source failed.*checksum"
    ):
        loom.receive(ticket, receivers(1))[0].result(40)


@pytest.mark.usefixtures("hasty")
def test_a_source_that_dies_midway_is_an_error_and_no_hang() -> None:
    loom = Chain(out=Rate(1e6))
    _, _, ticket = loom.send(1)
    found = loom.receive(ticket, receivers(3))
    time.sleep(0.5)
    began = time.monotonic()
    for source in ChainTransport._sources.values():
        source.close()
    for one in found:
        with pytest.raises((BroadcastError, DeadlineError)):
            one.result(40)
    assert time.monotonic() - began < 31


def test_what_comes_too_late_is_a_deadline_error() -> None:
    loom = Chain(out=Rate(1e5))
    _, _, ticket = loom.send(1)
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"version 1 did not arrive within 1 s"):
        loom.receive(ticket, receivers(1), deadline_s=1.0)[0].result(20)
    assert time.monotonic() - began < 5


def test_nobody_is_served_without_the_versions_key() -> None:
    loom = Chain()
    _, _, ticket = loom.send(1)
    for wrong in (
        replace(ticket, key=b"\0" * 32),
        replace(ticket, serial=b"\0" * 16),
    ):
        with pytest.raises(BroadcastError, match="version 1 cannot be fetched"):
            loom.receive(wrong, receivers(1), deadline_s=10.0)[0].result(20)
    assert "key" not in repr(ticket)


def test_a_request_for_chunks_that_do_not_exist_is_hung_up_on() -> None:
    loom = Chain()
    _, _, ticket = loom.send(1)
    for wanted in ([10**6], [-1], ["0"], "0"):
        with dial(ticket.source, "127.0.3.1", ticket.serial, ticket.key, CHUNKS, 5.0) as line:
            send_message(line, {"chunks": wanted})
            with pytest.raises(OSError, match=r"left|reset"):
                read_frame(line)


def test_an_older_version_is_no_longer_served_and_its_ways_are_side_by_side() -> None:
    loom = Chain()
    _, _, old = loom.send(1)
    manifest, buckets, ticket = loom.send(2)
    delta = loom.source.send(replace(manifest, base=replace(manifest.version, step=1)), buckets[:1])
    with pytest.raises(BroadcastError, match="version 1 cannot be fetched"):
        loom.receive(old, receivers(1), deadline_s=10.0)[0].result(20)
    assert same(loom.receive(ticket, receivers(1))[0].result(20), buckets)
    assert same(loom.receive(delta, receivers(1))[0].result(20), buckets[:1])


def test_relays_stop_serving_when_everybody_has_everything(relays: dict[str, Node]) -> None:
    loom = Chain()
    _, _, ticket = loom.send(1)
    for one in loom.receive(ticket, receivers(3)):
        one.result(40)
    mine = [relay for host, relay in relays.items() if host.startswith("127.0.3.")]
    assert len(mine) == 3
    deadline = time.monotonic() + 10
    while any(relay._holdings for relay in mine) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(relay._holdings for relay in mine)


@pytest.mark.parametrize(
    ("total_bytes", "engines", "nodes", "expected"),
    [
        (2**30, 8, 8, "chain"),
        (2**30, 8, 2, "object_store"),
        (2**30, 2, 8, "object_store"),
        (2**20, 8, 8, "object_store"),
    ],
)
def test_chains_are_chosen_for_much_that_goes_far(
    total_bytes: int, engines: int, nodes: int, expected: str
) -> None:
    assert chosen("auto", total_bytes, engines, nodes) == expected
    assert chosen("gloo", total_bytes, engines, nodes) == "gloo"
    BroadcastConfig(transport="auto").check()
