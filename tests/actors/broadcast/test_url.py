"""Weights through a URL, with a real S3 server that fails, stalls and lies. Across processes: tests/contracts and
tests/e2e/test_weights.py."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from tests.actors.broadcast.broadcast_fakes import (
    FakeEngine,
    FakeRank,
    InProcessEngine,
    InProcessRank,
    sparse_weights,
)
from tests.platform.object_store import Faults, s3_server, silent_endpoint

from treadle.actors.broadcast import url_objects
from treadle.actors.broadcast.buckets import pack
from treadle.actors.broadcast.config import BroadcastConfig
from treadle.actors.broadcast.coordinator import Coordinator
from treadle.actors.broadcast.outgoing import Outgoing
from treadle.actors.broadcast.phases import Receiver
from treadle.actors.broadcast.transports import chosen, fetch, spread
from treadle.actors.broadcast.url import UrlTicket, UrlTransport, _Sender
from treadle.platform import metric_names as names
from treadle.platform.errors import BroadcastError, ConfigError, DeadlineError, StorageError
from treadle.platform.records import PublishReport, WeightManifest
from treadle.platform.storage import Store, open_store

Transported = tuple[WeightManifest, list[np.ndarray]]
TIMEOUT_S = 1.0
"""Of a request without a byte."""


@dataclass(frozen=True, slots=True)
class Place:
    """A URL of a test's own, and what its server is told to do to objects there."""

    url: str
    faults: Faults

    def disturb(self, *faults: str, method: str = "GET", path: str = "", always: str = "") -> None:
        """The next requests of that method for objects whose path matches are answered with these faults."""
        mine = self.url.rpartition("/")[2]
        self.faults.concern = lambda m, p: m == method and mine in p and bool(re.search(path, p))
        self.faults.due, self.faults.always = list(faults), always

    def heal(self) -> None:
        self.faults.due, self.faults.always, self.faults.stall_s = [], "", 3.0

    @property
    def store(self) -> Store:
        return open_store(self.url)

    def objects(self) -> list[str]:
        return list(self.store.files())

    def damage(self, pattern: str, change: Callable[[bytes], bytes]) -> str:
        """Changes an object where it lies; returns its URL."""
        path = next(path for path in reversed(self.objects()) if re.search(pattern, path))
        self.store.write_bytes(path, change(self.store.read_bytes(path)))
        return self.store.url_of(path)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Faults]]:
    with pytest.MonkeyPatch.context() as environ, s3_server(environ) as served:
        yield served


@pytest.fixture
def place(server: tuple[str, Faults]) -> Iterator[Place]:
    found = Place(f"{server[0]}/weights-{secrets.token_hex(4)}", server[1])
    yield found
    found.heal()


class Loom:
    """A rank, two engines and their coordinator. Every version differs from the one before in an element of forty."""

    def __init__(
        self, place: Place, *, delta: bool = True, anchor_every: int = 0, deadline_s: float = 20.0
    ) -> None:
        self.place = place
        self.outgoing = Outgoing(
            transport="url",
            bucket_bytes=1700,
            delta=delta,
            url=place.url,
            url_timeout_s=TIMEOUT_S,
            deadline_s=deadline_s,
        )
        config = BroadcastConfig(
            transport="url",
            url=place.url,
            delta="auto" if delta else "off",
            anchor_every=anchor_every,
            stage_deadline_s=deadline_s,
        )
        self.engines = {
            f"rollout-{i}": InProcessEngine(FakeEngine(f"rollout-{i}", deadline_s=deadline_s))
            for i in range(2)
        }
        receivers: dict[str, Receiver] = dict(self.engines)
        ranks = [InProcessRank(FakeRank(0, make=sparse_weights), self.outgoing)]
        self.coordinator = Coordinator(config, ranks, receivers)
        self.token = self.coordinator.register()

    async def publish(self, step: int) -> PublishReport:
        report = await self.coordinator.publish(step, self.token)
        await asyncio.to_thread(self.swept)
        return report

    def swept(self) -> None:
        """Waits for the removal that follows a sending."""
        sender = _Sender._senders.get(self.place.url)
        if sender is not None:
            time.sleep(0.02)
            with sender._sweeping:
                pass

    def whole_at(self, step: int) -> bool:
        """Whether every engine holds that version, bit by bit."""
        return all(self.holds(name, step) for name in self.engines)

    def holds(self, name: str, step: int) -> bool:
        engine = self.engines[name].engine
        expected = sparse_weights(step)
        return engine.version.step == step and all(
            tensor.equal(expected[name]) for name, tensor in engine.weights.items()
        )

    def bases(self, name: str = "rollout-0") -> list[int | None]:
        """Of what an engine was offered: the step that a delta starts from, None for a whole version."""
        fetches = self.engines[name].engine.fetches
        return [None if manifest.base is None else manifest.base.step for manifest in fetches]


def version(step: int = 1) -> Transported:
    return pack(sparse_weights(step).items(), step, 1700)


def transport(url: str, deadline_s: float = 20.0) -> UrlTransport:
    return UrlTransport(url=url, timeout_s=TIMEOUT_S, deadline_s=deadline_s)


@pytest.mark.s3
def test_deltas_travel_between_whole_versions_and_only_what_is_needed_stays(place: Place) -> None:
    async def scenario() -> None:
        loom = Loom(place, anchor_every=3)
        for step in range(1, 8):
            report = await loom.publish(step)
            assert (len(report.adopted), report.behind) == (2, ())
            assert loom.whole_at(step)
            folders = {path.rpartition("/")[0] for path in place.objects()}
            assert len(folders) <= 2
        assert loom.bases() == [None, 1, 2, None, 4, 5, None]
        newcomer = InProcessEngine(FakeEngine("rollout-0"))
        loom.engines["rollout-0"] = newcomer
        await loom.coordinator.catch_up("rollout-0", newcomer)
        assert loom.whole_at(7)
        await loom.publish(8)
        assert loom.whole_at(8)
        assert loom.bases() == [None, 7]

    asyncio.run(scenario())


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["503", "404", "cut", "flip", "slow", "stall", "reset"])
def test_an_object_that_arrives_late_damaged_or_not_at_all_is_asked_for_again(
    place: Place, fault: str
) -> None:
    async def scenario() -> None:
        loom = Loom(place)
        await loom.publish(1)
        for path in (r"manifest\.json$", r"\d$"):
            place.disturb(fault, path=path)
            report = await loom.publish(loom.engines["rollout-0"].engine.version.step + 1)
            assert not place.faults.due
            assert report.behind == ()
            assert report.metrics[names.WEIGHTS_REFUSED] == 0
            assert report.metrics[names.WEIGHTS_BY_DELTA] == 2
        assert loom.whole_at(3)

    asyncio.run(scenario())


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["500", "stall", "lost"])
def test_a_write_that_fails_or_whose_answer_gets_lost_is_repeated(place: Place, fault: str) -> None:
    for path in (r"manifest\.json$", r"\d$"):
        place.disturb(fault, method="PUT", path=path)
        manifest, buckets = version()
        ticket = transport(place.url).send(manifest, buckets)
        assert not place.faults.due
        received = fetch(manifest, ticket, 20.0)
        assert all(map(np.array_equal, received, buckets))


@pytest.mark.s3
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda data: data[:50] + bytes([data[50] ^ 8]) + data[51:], r"fails its CRC-32"),
        (lambda data: data[:-3], r"has \d+ bytes instead of \d+"),
    ],
)
def test_what_lies_damaged_is_refused_by_name(
    place: Place, change: Callable[[bytes], bytes], found: str
) -> None:
    manifest, buckets = version()
    ticket = transport(place.url).send(manifest, buckets)
    damaged = place.damage(r"\d$", change)
    with pytest.raises(
        BroadcastError, match=f"version 1 cannot be fetched: {re.escape(damaged)} .*?{found}"
    ) as caught:
        fetch(manifest, ticket, 20.0)
    assert isinstance(caught.value.__cause__, StorageError)


@pytest.mark.s3
def test_a_missing_object_and_a_missing_manifest_are_named(place: Place) -> None:
    manifest, buckets = version()
    for path in (r"00000001", "manifest.json"):
        ticket = transport(place.url).send(manifest, buckets)
        place.store.remove(f"{ticket.folder}/{path}")
        with pytest.raises(BroadcastError, match=f"{ticket.folder}/{path} is missing"):
            fetch(manifest, ticket, 20.0)


@pytest.mark.s3
def test_a_delta_that_lies_damaged_gives_way_to_the_whole_version(place: Place) -> None:
    """Its folder's pieces are answered with a flipped bit for as long as anybody asks."""

    async def scenario() -> None:
        loom = Loom(place)
        await loom.publish(1)
        place.disturb(path=r"/000002/\d+$", always="flip")
        report = await loom.publish(2)
        assert report.behind == ()
        assert report.metrics[names.WEIGHTS_REFUSED] >= 2
        assert report.metrics[names.WEIGHTS_BY_DELTA] == 0
        assert loom.whole_at(2)
        place.heal()
        assert (await loom.publish(3)).metrics[names.WEIGHTS_BY_DELTA] == 2
        assert loom.whole_at(3)

    asyncio.run(scenario())


@pytest.mark.s3
def test_an_engine_that_cannot_reach_its_objects_keeps_its_version_whole_and_catches_up(place: Place) -> None:
    async def scenario() -> None:
        loom = Loom(place, deadline_s=4.0)
        await loom.publish(1)
        left = loom.engines["rollout-1"]
        left.engine.deadline_s = 0.0  # of two engines, this one's every request fails
        report = await loom.publish(2)
        assert (report.adopted, report.behind) == (("rollout-0",), ("rollout-1",))
        assert loom.holds("rollout-0", 2)
        assert loom.holds("rollout-1", 1)
        left.engine.deadline_s = 4.0
        assert (await loom.publish(3)).behind == ()
        assert loom.whole_at(3)
        assert loom.bases("rollout-1")[-1] == 1, "what it missed came as one delta"

    asyncio.run(scenario())


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["slow", "stall", "503"])
def test_a_bucket_that_answers_nobody_ends_the_publication_in_time_and_changes_no_engine(
    place: Place, fault: str
) -> None:
    async def scenario() -> None:
        loom = Loom(place, deadline_s=3.0)
        await loom.publish(1)
        place.disturb(always=fault)
        place.faults.stall_s = 10.0  # a byte comes in time, the object does not
        began = time.monotonic()
        with pytest.raises(
            BroadcastError,
            match=rf"no engine adopted version 2 .*DeadlineError.*version 2 did not arrive within 3 s: .*{place.url}/",
        ):
            await loom.publish(2)
        assert time.monotonic() - began < 15
        assert loom.whole_at(1)
        place.heal()
        await asyncio.sleep(TIMEOUT_S)
        assert (await loom.publish(3)).behind == ()
        assert loom.whole_at(3)

    asyncio.run(scenario())


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["stall", "503"])
def test_a_version_that_cannot_be_written_in_time_is_an_error_with_url_and_object(
    place: Place, fault: str
) -> None:
    place.disturb(method="PUT", always=fault)
    began = time.monotonic()
    with pytest.raises(
        DeadlineError,
        match=rf"version 1 was not written to {place.url} within 3 s: .*{place.url}/0001-\w+/000001/0",
    ):
        transport(place.url, deadline_s=3.0).send(*version())
    assert time.monotonic() - began < 8
    place.heal()
    manifest, buckets = version(2)
    assert len(fetch(manifest, transport(place.url).send(manifest, buckets), 20.0)) == len(buckets)


@pytest.mark.s3
def test_a_refusal_is_told_at_once(place: Place) -> None:
    manifest, buckets = version()
    ticket = transport(place.url).send(manifest, buckets)
    began = time.monotonic()
    place.disturb(method="PUT", always="403")
    with pytest.raises(BroadcastError, match=rf"cannot be written: cannot write {place.url}/.*access denied"):
        transport(place.url).send(manifest, buckets)
    place.disturb(always="403")
    place.faults.concern = lambda method, path: True
    with pytest.raises(BroadcastError, match=rf"cannot be fetched: cannot read {place.url}/.*access denied"):
        fetch(manifest, ticket, 20.0)
    place.heal()
    with pytest.raises(BroadcastError, match=r"s3://no-such-bucket/x/.*does not exist"):
        transport("s3://no-such-bucket/x").send(manifest, buckets)
    assert time.monotonic() - began < 8


@pytest.mark.s3
def test_an_endpoint_that_never_answers_costs_both_sides_their_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with silent_endpoint() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        url, began = f"s3://bucket/{secrets.token_hex(4)}", time.monotonic()
        with pytest.raises(DeadlineError, match=f"version 1 was not written to {url} within 1 s"):
            transport(url, deadline_s=1.0).send(*version())
        ticket = UrlTicket(
            step=1, url=url, folder="f", manifest_bytes=1, manifest_crc32=1, timeout_s=TIMEOUT_S
        )
        with pytest.raises(DeadlineError, match=f"within 1 s: no answer about {url}/f/manifest.json"):
            transport("").receive(ticket, 1.0)
        assert time.monotonic() - began < 6


def test_it_is_the_same_on_a_disk_and_old_versions_are_removed(tmp_path: Path) -> None:
    mine = transport(f"file://{tmp_path}/weights")
    for step in range(1, 6):
        manifest, buckets = version(step)
        ticket = mine.send(manifest, buckets)
        assert all(map(np.array_equal, fetch(manifest, ticket, 10.0), buckets))
    assert soon(lambda: len(list(tmp_path.glob("weights/*/*"))) == 2)
    assert sorted(path.name for path in tmp_path.glob("weights/*/*")) == ["000004", "000005"]


def test_a_version_offered_from_many_bases_keeps_them_all(tmp_path: Path) -> None:
    mine = transport(f"file://{tmp_path}/weights")
    manifest, buckets = version(3)
    from_1 = replace(manifest, base=replace(manifest.version, step=1, digest="1" * 32))
    from_2 = replace(manifest, base=replace(manifest.version, step=2, digest="2" * 32))
    first = mine.send(manifest, buckets)
    tickets = [mine.send(way, buckets) for way in (manifest, from_1, from_2)]
    kept = {ticket.folder.rpartition("/")[2] for ticket in tickets}
    assert soon(lambda: {path.name for path in tmp_path.glob("weights/*/*")} == kept)
    with pytest.raises(BroadcastError, match="is missing"):
        fetch(manifest, first, 10.0)
    for way, ticket in zip((manifest, from_1, from_2), tickets, strict=True):
        assert all(map(np.array_equal, fetch(way, ticket, 10.0), buckets))


def test_a_sender_removes_what_its_predecessors_left_and_nothing_of_its_successors(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/weights"
    store = open_store(url)
    store.write_bytes("0003-aaaaaaaa/000001/00000000", b"left by a learner that died")
    store.write_bytes("notes/mine", b"somebody's")
    manifest, buckets = version(1)
    ticket = transport(url).send(manifest, buckets)
    assert ticket.folder.startswith("0004-")
    store.write_bytes("0005-bbbbbbbb/000001/00000000", b"of the one that replaced it")
    assert soon(lambda: not store.exists("0003-aaaaaaaa"))
    transport(url).send(*version(2))
    _swept(url)
    assert store.exists("0005-bbbbbbbb/000001/00000000")
    assert store.exists("notes/mine")


def _swept(url: str) -> None:
    time.sleep(0.05)
    with _Sender._senders[url]._sweeping:
        pass


def soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def test_versions_larger_than_a_piece_arrive_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.actors.broadcast.url.PIECE_BYTES", 999)
    manifest, buckets = version(1)
    ticket = transport(f"file://{tmp_path}").send(manifest, buckets)
    files = [path.name for path in (tmp_path / ticket.folder).iterdir()]
    assert len(files) - 1 == sum(-(-len(bucket) // 999) for bucket in buckets) > len(buckets)
    assert all(map(np.array_equal, fetch(manifest, ticket, 10.0), buckets))


def test_work_of_many_lanes_ends_with_its_first_error_or_at_the_deadline() -> None:
    def work(item: int) -> None:
        if item == 3:
            raise StorageError("three")
        time.sleep(0.01 if item < 90 else 5)

    began = time.monotonic()
    url_objects.each(work, [0, 1, 2, 4], began + 5, str)
    with pytest.raises(StorageError, match="three"):
        url_objects.each(work, range(40), began + 5, str)
    with pytest.raises(TimeoutError, match="no answer about item 90"):
        url_objects.each(work, [1, 90], time.monotonic() + 0.3, lambda item: f"item {item}")
    url_objects.each(work, [], began, str)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"transport": "url"}, "broadcast.transport=url needs broadcast.url"),
        ({"url": "s3://b/x"}, "broadcast.url=s3://b/x is not used with broadcast.transport=object_store"),
        ({"transport": "gloo", "url": "s3://b/x"}, "not used with broadcast.transport=gloo"),
        ({"transport": "url", "url": "gopher://b/x"}, "broadcast.url=gopher://b/x: no storage for gopher://"),
        ({"transport": "url", "url": "memory://x"}, "memory of one process"),
        ({"transport": "url", "url": "runs/weights"}, "relative path"),
        ({"transport": "auto", "url": "file://weights"}, "relative path"),
        ({"transport": "url", "url": "/x", "url_timeout_s": 0.0}, "broadcast.url_timeout_s=0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_sentence(
    settings: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        BroadcastConfig(**settings).check()  # type: ignore[arg-type]
    assert caught.value.remedy
    for url in ("s3://bucket/prefix", "file:///shared/weights", "/shared/weights"):
        for name in ("url", "auto"):
            BroadcastConfig(transport=name, url=url).check()


def test_the_url_is_chosen_where_nodes_are_far_from_each_other() -> None:
    assert chosen("auto", 2**30, 8, 8, far=True) == "url"
    assert chosen("auto", 2**10, 1, 2, far=True) == "url"
    assert chosen("auto", 2**30, 8, 8) == "chain"
    assert chosen("auto", 2**10, 1, 2) == "object_store"
    assert chosen("gloo", 2**10, 1, 2, far=True) == "gloo"


def test_nodes_of_several_regions_are_far_from_each_other() -> None:
    here, there = {"ray.io/availability-region": "eu-north-1"}, {"ray.io/availability-region": "us-west-2"}
    assert spread([here, there])
    assert not spread([here, here])
    assert not spread([here, {}, {"ray.io/node-group": "rollout"}])
    assert not spread([])


def test_a_transport_without_its_url_says_so() -> None:
    with pytest.raises(ConfigError, match=r"broadcast\.url is empty"):
        UrlTransport().send(*version())
