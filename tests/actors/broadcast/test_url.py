"""Weights through a URL, with a real S3 server that fails, stalls and lies. Across processes: tests/contracts and
tests/e2e/test_weights.py."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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

from treadle.actors.broadcast.buckets import pack
from treadle.actors.broadcast.config import BroadcastConfig
from treadle.actors.broadcast.coordinator import Coordinator
from treadle.actors.broadcast.outgoing import Outgoing
from treadle.actors.broadcast.phases import Receiver
from treadle.actors.broadcast.transports import fetch
from treadle.actors.broadcast.url import UrlTicket, UrlTransport, _Sender
from treadle.platform import metric_names as names
from treadle.platform.errors import BroadcastError, DeadlineError, StorageError
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
