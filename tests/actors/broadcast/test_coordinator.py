"""The coordinator without Ray: two phases, deadlines, fencing. Weights travel through the gloo transport."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Collection, Iterator

import pytest
from tests.actors.broadcast.broadcast_fakes import (
    FakeEngine,
    FakeRank,
    InProcessEngine,
    InProcessRank,
    LoopbackGloo,
)

from treadle.actors.broadcast import transports
from treadle.actors.broadcast.config import BroadcastConfig
from treadle.actors.broadcast.coordinator import Coordinator
from treadle.actors.broadcast.outgoing import Outgoing
from treadle.actors.broadcast.phases import EngineLostError, Receiver
from treadle.platform import failpoints
from treadle.platform.errors import (
    BroadcastError,
    ConfigError,
    DeadlineError,
    FailpointError,
    MismatchError,
)
from treadle.platform.records import Offered, PublishReport, Staged, WeightManifest, WeightVersion

CONFIG = BroadcastConfig(
    transport="gloo", bucket_bytes=1700, gather_deadline_s=5, stage_deadline_s=3, flip_deadline_s=3
)


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transports.TRANSPORTS, "gloo", f"{LoopbackGloo.__module__}:{LoopbackGloo.__name__}")


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    monkeypatch.delenv(failpoints.ENV, raising=False)
    failpoints.arm()


class Loom:
    """Two ranks, two engines, one coordinator."""

    def __init__(self, config: BroadcastConfig = CONFIG, engines: int = 2) -> None:
        outgoing = Outgoing(transport=config.transport, bucket_bytes=config.bucket_bytes)
        self.ranks = [InProcessRank(FakeRank(rank), outgoing) for rank in range(2)]
        self.engines = {f"rollout-{i}": InProcessEngine(FakeEngine(f"rollout-{i}")) for i in range(engines)}
        receivers: dict[str, Receiver] = dict(self.engines)
        self.coordinator = Coordinator(config, self.ranks, receivers)
        self.token = self.coordinator.register()

    async def publish(self, step: int) -> PublishReport:
        return await self.coordinator.publish(step, self.token)

    def serves(self) -> list[tuple[int, set[int]]]:
        return [engine.engine.serves() for engine in self.engines.values()]


def test_a_version_reaches_every_engine_and_every_rank_takes_part() -> None:
    loom = Loom()
    report = asyncio.run(loom.publish(7))
    assert report.adopted == ("rollout-0", "rollout-1")
    assert report.behind == ()
    assert loom.serves() == [(7, {7}), (7, {7})]
    assert [rank.rank.calls for rank in loom.ranks] == [1, 1]
    assert report.version.step == 7
    assert len(report.version.digest) == 32
    assert report.sent_bytes >= 2 * 4 * 200 * 4
    phases = ("gather_s", "encode_s", "stage_s", "flip_s")
    assert 0 < sum(report.metrics[f"weights/{phase}"] for phase in phases) <= report.wall_s + 0.01
    assert report.metrics["weights/dense_bytes"] == report.sent_bytes
    assert (report.metrics["weights/wire_s"], report.metrics["weights/apply_s"]) == (0.01, 0.02)
    assert report.metrics["weights_lag/rollout-0"] == report.metrics["weights_lag/rollout-1"] == 0
    assert loom.coordinator.held == {"rollout-0": report.version, "rollout-1": report.version}


def test_a_frozen_engine_is_left_behind_once_per_freeze_and_catches_up() -> None:
    async def scenario() -> None:
        loom = Loom(dataclasses.replace(CONFIG, stage_deadline_s=1.0))
        frozen = loom.engines["rollout-1"]
        frozen.frozen = True
        first = await loom.publish(1)
        assert (first.adopted, first.behind) == (("rollout-0",), ("rollout-1",))
        start = time.monotonic()
        second = await loom.publish(2)
        assert time.monotonic() - start < 0.9, "a frozen engine costs its deadline once, not per publication"
        assert second.behind == ("rollout-1",)
        assert loom.serves() == [(2, {2}), (0, {0})]
        frozen.frozen = False
        assert (await loom.coordinator.catch_up("rollout-1", frozen)) == second.version
        third = await loom.publish(3)
        assert third.behind == ()
        assert loom.serves() == [(3, {3}), (3, {3})]

    asyncio.run(scenario())


def test_a_slow_engine_that_finishes_late_is_included_again() -> None:
    async def scenario() -> None:
        loom = Loom(dataclasses.replace(CONFIG, stage_deadline_s=0.8))
        loom.engines["rollout-1"].engine.slow_s = 1.2
        assert (await loom.publish(1)).behind == ("rollout-1",)
        await asyncio.sleep(1.0)
        loom.engines["rollout-1"].engine.slow_s = 0.0
        assert loom.serves()[1] == (0, {0}), "what is staged late is not adopted"
        assert (await loom.publish(2)).behind == ()
        assert loom.serves() == [(2, {2}), (2, {2})]

    asyncio.run(scenario())


def test_a_bit_flipped_in_transit_is_fetched_again(faults: pytest.MonkeyPatch) -> None:
    faults.setenv(failpoints.ENV, "broadcast.in_transit=corrupt@1")
    failpoints.arm()
    loom = Loom()
    report = asyncio.run(loom.publish(1))
    assert report.behind == ()
    assert sum(engine.stages for engine in loom.engines.values()) == 3
    assert loom.serves() == [(1, {1}), (1, {1})]


def test_a_line_that_damages_everything_is_an_error_and_nobody_changes(faults: pytest.MonkeyPatch) -> None:
    faults.setenv(failpoints.ENV, "broadcast.in_transit=corrupt@*")
    failpoints.arm()
    loom = Loom()
    with pytest.raises(BroadcastError, match=r"no engine adopted version 1 .*rollout-0: .*CRC-32"):
        asyncio.run(loom.publish(1))
    assert loom.serves() == [(0, {0}), (0, {0})]


def test_when_all_engines_are_gone_the_version_waits_for_their_successors() -> None:
    loom = Loom()

    class Gone(InProcessEngine):
        async def stage(self, manifest: WeightManifest, ticket: object) -> Staged:
            raise EngineLostError("its process 4711 was killed or crashed.")

    async def scenario() -> None:
        await loom.publish(1)
        living = dict(loom.engines)
        for name, engine in living.items():
            with pytest.raises(BroadcastError, match=f"no engine adopted version 1 .*{name}: it was lost"):
                await loom.coordinator.catch_up(name, Gone(engine.engine))
        report = await loom.publish(2)
        assert (report.adopted, sorted(report.behind)) == ((), sorted(living))
        for name, engine in living.items():
            version = await loom.coordinator.catch_up(name, engine)
            assert version is not None
            assert version.step == 2

    asyncio.run(scenario())
    assert loom.serves() == [(2, {2}), (2, {2})]


@pytest.mark.parametrize("point", ["broadcast.before_publish", "broadcast.between_phases"])
def test_a_coordinator_that_breaks_before_the_flip_changes_nobody(
    faults: pytest.MonkeyPatch, point: str
) -> None:
    faults.setenv(failpoints.ENV, f"{point}=raise@1")
    failpoints.arm()
    loom = Loom()
    with pytest.raises(FailpointError):
        asyncio.run(loom.publish(1))
    assert loom.serves() == [(0, {0}), (0, {0})]
    assert asyncio.run(loom.publish(1)).behind == ()
    assert loom.serves() == [(1, {1}), (1, {1})]


def test_a_failure_after_the_flip_can_be_repeated(faults: pytest.MonkeyPatch) -> None:
    faults.setenv(failpoints.ENV, "broadcast.after_flip=raise@1")
    failpoints.arm()
    loom = Loom()
    with pytest.raises(FailpointError):
        asyncio.run(loom.publish(1))
    assert loom.serves() == [(1, {1}), (1, {1})]
    assert asyncio.run(loom.publish(1)).adopted == ("rollout-0", "rollout-1")


def test_a_loader_that_changes_weights_stops_the_run_and_a_slip_is_repaired() -> None:
    loom = Loom()
    loom.engines["rollout-1"].engine.spoil = 1
    assert asyncio.run(loom.publish(1)).behind == ()
    assert loom.serves() == [(1, {1}), (1, {1})]
    loom.engines["rollout-1"].engine.spoil = 2
    with pytest.raises(MismatchError, match=r"engine rollout-1: version 2 was adopted with digest"):
        asyncio.run(loom.publish(2))
    assert "rollout-1" not in loom.coordinator.held


class LyingRank(InProcessRank):
    """Its manifest has another digest than its buckets."""

    async def publish(self, step: int, bases: Collection[str]) -> Offered | None:
        offered = await super().publish(step, bases)
        assert offered is not None
        wrong = dataclasses.replace(offered.dense, version=WeightVersion(step=step, digest="0" * 32))
        return dataclasses.replace(offered, dense=wrong, ways=((wrong, offered.ways[0][1]),))


def test_engines_that_agree_against_the_learner_prove_it_wrong() -> None:
    loom = Loom()
    loom.coordinator._sources = (LyingRank(FakeRank(0), loom.ranks[0].outgoing),)
    with pytest.raises(MismatchError, match="the learner's manifest says 0000"):
        asyncio.run(loom.publish(1))
    assert loom.serves() == [(0, {0}), (0, {0})]


def test_steps_go_forward_only_and_a_repetition_is_allowed() -> None:
    async def scenario() -> None:
        loom = Loom()
        await loom.publish(5)
        with pytest.raises(BroadcastError, match="step 4 is older than the published 5"):
            await loom.publish(4)
        assert (await loom.publish(5)).behind == ()

    asyncio.run(scenario())


def test_a_new_publisher_fences_the_old_one_off_and_may_go_back() -> None:
    async def scenario() -> None:
        loom = Loom()
        await loom.publish(5)
        old, loom.token = loom.token, loom.coordinator.register()
        with pytest.raises(BroadcastError, match=f"publisher {old} was replaced by publisher {loom.token}"):
            await loom.coordinator.publish(6, old)
        assert (await loom.publish(2)).behind == ()
        assert loom.serves() == [(2, {2}), (2, {2})]

    asyncio.run(scenario())


class SilentRank(InProcessRank):
    async def publish(self, step: int, bases: Collection[str]) -> Offered | None:
        await asyncio.Event().wait()
        return None


class BrokenRank(InProcessRank):
    async def publish(self, step: int, bases: Collection[str]) -> Offered | None:
        raise RuntimeError("out of memory")


def test_a_silent_or_broken_learner_rank_is_named() -> None:
    loom = Loom(dataclasses.replace(CONFIG, gather_deadline_s=0.5))
    outgoing = loom.ranks[0].outgoing
    loom.coordinator._sources = (loom.ranks[0], SilentRank(FakeRank(1), outgoing))
    with pytest.raises(
        DeadlineError, match=r"ranks \[1\] did not offer version 1 within 0.5 s; .* \(SilentRank\)"
    ):
        asyncio.run(loom.publish(1))
    loom.coordinator._sources = (SilentRank(FakeRank(0), outgoing), BrokenRank(FakeRank(1), outgoing))
    with pytest.raises(BroadcastError, match="rank 1 could not offer version 1: out of memory"):
        asyncio.run(loom.publish(1))
    loom.coordinator._sources = (InProcessRank(FakeRank(1), outgoing),)
    with pytest.raises(BroadcastError, match="0 of 1 learner ranks offered"):
        asyncio.run(loom.publish(1))


def test_a_respawned_engine_catches_up_before_and_after_the_first_publication() -> None:
    async def scenario() -> None:
        loom = Loom(engines=1)
        fresh = InProcessEngine(FakeEngine("rollout-0"))
        assert await loom.coordinator.catch_up("rollout-0", fresh) is None
        await loom.publish(3)
        assert fresh.engine.serves() == (3, {3})
        respawned = InProcessEngine(FakeEngine("rollout-9"))
        version = await loom.coordinator.catch_up("rollout-9", respawned)
        assert version is not None
        assert version.step == 3
        assert respawned.engine.serves() == (3, {3})
        assert (await loom.publish(4)).adopted == ("rollout-0", "rollout-9")
        await loom.coordinator.forget("rollout-9")
        assert (await loom.publish(5)).adopted == ("rollout-0",)

    asyncio.run(scenario())


def test_without_engines_a_publication_still_makes_a_version() -> None:
    report = asyncio.run(Loom(engines=0).publish(1))
    assert (report.adopted, report.behind) == ((), ())


@pytest.mark.parametrize(
    "change",
    [
        {"transport": "pigeon"},
        {"bucket_bytes": 0},
        {"stage_deadline_s": -1.0},
        {"probe_every": -1},
        {"probe_limit": 0.0},
        {"probe_tokens": 1},
        {"delta": "on"},
        {"anchor_every": -1},
        {"dense_above": 1.5},
    ],
)
def test_settings_that_cannot_work_are_named(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"broadcast.{next(iter(change))}|broadcast.probe"):
        dataclasses.replace(BroadcastConfig(), **change).check()  # type: ignore[arg-type]
    BroadcastConfig().check()
    assert os.environ.get(failpoints.ENV) is None
