"""`contracts.Broadcast` over real Ray: coordinator, learner ranks and engines are processes that can be
killed."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from tests.actors.broadcast.broadcast_fakes import FakeEngine, FakeRank, sparse_weights, weights
from tests.actors.broadcast.test_probe import UnigramScorer

from treadle.actors.broadcast.actor import CoordinatorActor
from treadle.actors.broadcast.client import Broadcaster
from treadle.actors.broadcast.config import BroadcastConfig
from treadle.actors.broadcast.outgoing import Outgoing
from treadle.actors.broadcast.probe import Probe, probe_sequences
from treadle.actors.calls import once
from treadle.kernels.digest import state_digest
from treadle.platform.contracts import Broadcast
from treadle.platform.errors import BroadcastError, MismatchError
from treadle.platform.failpoints import failpoint
from treadle.platform.metric_names import MISMATCH_MAX
from treadle.platform.records import Staged, WeightManifest, WeightVersion

pytestmark = pytest.mark.ray

CONFIG = BroadcastConfig(
    bucket_bytes=1 << 20, gather_deadline_s=60, stage_deadline_s=20, flip_deadline_s=20, probe_every=0
)


@ray.remote(num_cpus=0)
class Rank(FakeRank):
    @once
    def publish(self, step: int, outgoing: Outgoing, bases: Collection[str]) -> Any:
        return super().publish(step, outgoing, bases)

    def dense(self, step: int) -> Any:
        return super().dense(step)


@ray.remote(num_cpus=0)
class Engine(FakeEngine):
    @once
    def stage(self, manifest: WeightManifest, ticket: object) -> Staged:
        return super().stage(manifest, ticket)

    @once
    def flip(self, version: WeightVersion) -> str:
        failpoint("rollout.before_flip")
        return super().flip(version)

    def serves(self) -> tuple[int, set[int]]:
        return super().serves()

    def bases(self) -> list[int | None]:
        return [None if manifest.base is None else manifest.base.step for manifest in self.fetches]

    def digest(self) -> str:
        return state_digest(self.weights.items())

    def set_slow(self, slow_s: float) -> None:
        self.slow_s = slow_s

    def pid(self) -> int:
        return os.getpid()


class Loom:
    """Two ranks of a model of demo size, two engines, the coordinator and its client."""

    def __init__(
        self,
        config: BroadcastConfig = CONFIG,
        probe: Probe | None = None,
        faults: str = "",
        make: Callable[..., dict[str, torch.Tensor]] = weights,
    ) -> None:
        env = {"env_vars": {"TREADLE_FAILPOINTS": faults}} if faults else None
        self.ranks = [Rank.remote(rank, tensors=26, size=128 * 128, make=make) for rank in range(2)]
        doomed = Engine.options(runtime_env=env) if env else Engine
        self.engines = {"rollout-0": Engine.remote("rollout-0"), "rollout-1": doomed.remote("rollout-1")}
        self.coordinator = CoordinatorActor.remote(config, self.ranks, self.engines)
        self.client = Broadcaster(self.coordinator, config, probe)
        ray.get([engine.pid.remote() for engine in self.engines.values()], timeout=120)

    def serves(self, name: str) -> tuple[int, set[int]]:
        return ray.get(self.engines[name].serves.remote(), timeout=60)

    def close(self) -> None:
        for handle in (*self.ranks, *self.engines.values(), self.coordinator):
            ray.kill(handle)


@pytest.fixture(scope="module")
def loom(ray_session: None) -> Iterator[Loom]:
    """Shared by the tests that leave it whole."""
    loom = Loom()
    yield loom
    loom.close()


def test_the_client_keeps_the_protocol_and_reaches_every_engine(loom: Loom) -> None:
    assert isinstance(loom.client, Broadcast)
    report = asyncio.run(loom.client.publish(1))
    assert report.adopted == ("rollout-0", "rollout-1")
    assert loom.serves("rollout-0") == loom.serves("rollout-1") == (1, {1})
    assert loom.client.version == report.version
    assert report.sent_bytes == pytest.approx(2 * 26 * 128 * 128 * 4, rel=0.01)


def test_a_publication_of_demo_size_is_quick(loom: Loom) -> None:
    async def best() -> float:
        await loom.client.register()
        walls = []
        for step in range(1, 8):
            start = time.perf_counter()
            await loom.client.publish(step)
            walls.append(time.perf_counter() - start)
        return min(walls)

    wall_s = asyncio.run(best())
    print(f"publication of 1.7 MB to 2 engines: {wall_s * 1e3:.1f} ms")
    assert wall_s < 0.25, "40 ms on two idle cores; this bound is for a crowded machine"


def test_an_older_step_is_refused_and_a_new_publisher_takes_over(loom: Loom) -> None:
    async def scenario() -> None:
        await loom.client.register()
        await loom.client.publish(9)
        with pytest.raises(BroadcastError, match="older than the published 9"):
            await loom.client.publish(8)
        successor = Broadcaster(loom.coordinator, CONFIG)
        assert (await successor.publish(3)).behind == ()
        with pytest.raises(BroadcastError, match="was replaced by publisher"):
            await loom.client.publish(10)

    asyncio.run(scenario())
    assert loom.serves("rollout-0") == (3, {3})


def test_a_probe_that_disagrees_stops_the_run_and_one_that_agrees_is_reported(loom: Loom) -> None:
    def client(shift: float) -> Broadcaster:
        probe = Probe(
            rollouts=UnigramScorer({"rollout-0": 0.0, "rollout-1": shift}),
            learner=UnigramScorer({"learner": 0.0}),
            sequences=probe_sequences(40, 2, 8),
            limit=1e-3,
        )
        return Broadcaster(loom.coordinator, dataclasses.replace(CONFIG, probe_every=2), probe)

    async def scenario() -> None:
        agreeing = client(1e-4)
        reports = [await agreeing.publish(step) for step in (1, 2, 3)]
        assert [MISMATCH_MAX in report.metrics for report in reports] == [True, False, True]
        assert reports[0].metrics[MISMATCH_MAX] == pytest.approx(1e-4, rel=0.1)
        with pytest.raises(MismatchError, match="engine rollout-1"):
            await client(0.2).publish(4)

    asyncio.run(scenario())


def test_an_engine_killed_between_the_phases_is_left_behind_and_its_successor_catches_up(
    ray_session: None,
) -> None:
    loom = Loom(faults="rollout.before_flip=kill@2")

    async def scenario() -> None:
        assert (await loom.client.publish(1)).behind == ()
        report = await loom.client.publish(2)
        assert (report.adopted, report.behind) == (("rollout-0",), ("rollout-1",))
        assert loom.serves("rollout-0") == (2, {2})
        assert (
            "rollout-1" not in await loom.client.held() or (await loom.client.held())["rollout-1"].step == 1
        )
        loom.engines["rollout-1"] = Engine.remote("rollout-1")
        version = await loom.client.catch_up("rollout-1", loom.engines["rollout-1"])
        assert version == report.version
        assert loom.serves("rollout-1") == (2, {2})
        assert (await loom.client.publish(3)).behind == ()

    asyncio.run(scenario())
    assert loom.serves("rollout-0") == loom.serves("rollout-1") == (3, {3})
    loom.close()


def test_a_slow_engine_keeps_its_version_and_a_corrupted_one_fetches_again(ray_session: None) -> None:
    config = dataclasses.replace(CONFIG, stage_deadline_s=3.0)
    loom = Loom(config, faults="broadcast.in_transit=corrupt@2")

    async def scenario() -> None:
        assert (await loom.client.publish(1)).behind == ()
        assert (await loom.client.publish(2)).behind == (), "corrupted once, fetched again"
        ray.get(loom.engines["rollout-0"].set_slow.remote(6.0))
        report = await loom.client.publish(3)
        assert (report.adopted, report.behind) == (("rollout-1",), ("rollout-0",))
        assert loom.serves("rollout-1") == (3, {3})
        assert loom.serves("rollout-0") == (2, {2}), "what it staged too late it must not serve"
        ray.get(loom.engines["rollout-0"].set_slow.remote(0.0))
        assert (await loom.client.publish(4)).behind == ()

    asyncio.run(scenario())
    assert loom.serves("rollout-0") == loom.serves("rollout-1") == (4, {4})
    loom.close()


@pytest.mark.parametrize("transport", ["object_store", "gloo"])
def test_deltas_reach_other_processes_and_an_engine_that_joins_gets_everything(
    ray_session: None, transport: str
) -> None:
    config = dataclasses.replace(CONFIG, transport=transport, delta="auto", anchor_every=0)
    loom = Loom(config, make=sparse_weights)

    async def scenario() -> None:
        reports = [await loom.client.publish(step) for step in (1, 2)]
        loom.engines["rollout-1"] = Engine.remote("rollout-1")
        joined = await loom.client.catch_up("rollout-1", loom.engines["rollout-1"])
        assert joined == reports[1].version
        reports.append(await loom.client.publish(3))
        assert all(report.behind == () for report in reports)
        assert reports[2].sent_bytes * 8 < reports[0].sent_bytes
        for name, bases in (("rollout-0", [None, 1, 2]), ("rollout-1", [None, 2])):
            assert await loom.engines[name].bases.remote() == bases
            assert await loom.engines[name].digest.remote() == reports[2].version.digest

    asyncio.run(scenario())
    loom.close()


def test_a_coordinator_that_is_replaced_starts_dense_and_deltas_go_on(ray_session: None) -> None:
    config = dataclasses.replace(CONFIG, delta="auto", anchor_every=0)
    loom = Loom(config, make=sparse_weights)

    def launch() -> Any:
        return CoordinatorActor.remote(config, loom.ranks, loom.engines)

    client = Broadcaster(loom.coordinator, config, launch=launch)

    async def scenario() -> None:
        for step in (1, 2):
            await client.publish(step)
        ray.kill(loom.coordinator)
        for step in (3, 4):
            assert (await client.publish(step)).behind == ()
        assert await loom.engines["rollout-0"].bases.remote() == [None, 1, None, 3]

    asyncio.run(scenario())
    assert client.restarts == 1
    client.close()
    for handle in (*loom.ranks, *loom.engines.values()):
        ray.kill(handle)


def test_dead_engines_are_left_behind_a_dead_rank_and_a_dead_coordinator_are_errors(
    ray_session: None,
) -> None:
    loom = Loom()

    async def scenario() -> None:
        await loom.client.publish(1)
        for engine in loom.engines.values():
            os.kill(ray.get(engine.pid.remote()), signal.SIGKILL)
        report = await loom.client.publish(2)
        assert (report.adopted, sorted(report.behind)) == ((), sorted(loom.engines))
        ray.kill(loom.ranks[1])
        with pytest.raises(BroadcastError, match="learner rank 1 could not offer version 3"):
            await loom.client.publish(3)
        ray.kill(loom.coordinator)
        with pytest.raises(BroadcastError, match="the weight coordinator has died"):
            await loom.client.publish(3)

    asyncio.run(scenario())
    ray.kill(loom.ranks[0])


@pytest.mark.parametrize(
    "point", ["broadcast.before_publish", "broadcast.between_phases", "broadcast.after_flip"]
)
def test_a_coordinator_that_dies_is_replaced_and_the_version_published_once_more(
    ray_session: None, tmp_path: Path, point: str
) -> None:
    loom = Loom()
    env = {"TREADLE_FAILPOINTS": f"{point}=kill@2", "TREADLE_FAILPOINTS_ONCE": str(tmp_path)}

    def launch() -> Any:
        doomed = CoordinatorActor.options(runtime_env={"env_vars": env})
        return doomed.remote(CONFIG, loom.ranks, loom.engines)

    client = Broadcaster(launch(), CONFIG, launch=launch)

    async def scenario() -> None:
        for step in (1, 2, 3):
            report = await client.publish(step)
            assert report.adopted == ("rollout-0", "rollout-1")
            for name in loom.engines:
                version, mixture = loom.serves(name)
                assert (version, mixture) == (step, {step})

    asyncio.run(scenario())
    assert client.restarts == 1
    assert len(list(tmp_path.iterdir())) == 1
    client.close()
    loom.close()


@ray.remote(num_cpus=0, concurrency_groups={"health": 1})
class Frozen:
    """A coordinator whose event loop stands still in `publish`."""

    @once
    async def register(self) -> int:
        return 1

    @once
    async def publish(self, step: int, token: int) -> None:
        time.sleep(3600)

    async def phase(self) -> str:
        return "engines fetch version 1"

    @ray.method(concurrency_group="health")
    async def where(self) -> str:
        return "in publish (coordinator.py:1)"


def test_a_coordinator_that_falls_silent_is_given_up_long_before_the_publication_is_late(
    ray_session: None,
) -> None:
    config = dataclasses.replace(CONFIG, heartbeat_s=0.1, silence_deadline_s=1.0, gather_deadline_s=600.0)
    frozen = Frozen.remote()  # type: ignore[attr-defined]
    start = time.monotonic()
    with pytest.raises(BroadcastError) as error:
        asyncio.run(Broadcaster(frozen, config).publish(1))
    assert time.monotonic() - start < 60
    assert "the weight coordinator has been silent for 1 s" in error.value.message
    assert "it hangs in publish (coordinator.py:1)" in error.value.message
    assert "broadcast.silence_deadline_s" in error.value.remedy
    ray.kill(frozen)


def test_a_coordinator_that_does_not_answer_is_given_up(ray_session: None) -> None:
    config = dataclasses.replace(CONFIG, gather_deadline_s=0.1, stage_deadline_s=0.1, flip_deadline_s=0.1)
    frozen = Frozen.remote()  # type: ignore[attr-defined]
    client = Broadcaster(frozen, config)
    start = time.monotonic()
    with pytest.raises(BroadcastError, match="did not answer within"):
        asyncio.run(client.publish(1))
    assert time.monotonic() - start < 60
    ray.kill(frozen)
