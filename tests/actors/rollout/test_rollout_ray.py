"""Real Ray workers with real engines: determinism across workers, a kill in the middle of a draw,
adoption."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import ray
from tests.actors.rollout.tiny_models import issue, write_model
from transformers import AutoModelForCausalLM

from treadle.actors.broadcast.buckets import pack
from treadle.actors.broadcast.transports import build as build_transport
from treadle.actors.rollout.actor import RayWorker, ray_launch
from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.handles import WorkerHandle
from treadle.actors.rollout.pool import RolloutPool
from treadle.actors.rollout.torch_engine import TorchEngine, build
from treadle.platform.errors import DataError, RolloutError
from treadle.platform.packed import Packed
from treadle.platform.records import Drawn, Group, Issue, Sample, WeightManifest, WeightVersion
from treadle.workflows.roles import opened, texts_of

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

CONFIG = RolloutConfig(
    workers=2,
    slots=32,
    max_context_tokens=256,
    heartbeat_s=0.5,
    silence_deadline_s=8.0,
    draw_deadline_s=200.0,
    start_deadline_s=240.0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), width=64)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("other"), width=64, seed=1)


@dataclass(frozen=True, kw_only=True)
class Started:
    """A pool and the event loop it lives on; starting workers is what costs time here."""

    runner: asyncio.Runner
    pool: RolloutPool

    def run(self, use: Callable[[RolloutPool], Awaitable[None]], folder: str) -> None:
        """Runs `use` on a pool whose workers have all just loaded `folder`."""

        async def go() -> None:
            while len(self.pool.workers) < CONFIG.workers or not self.pool.all_ready:
                await asyncio.sleep(0.1)
            await self.pool.load(folder)
            await use(self.pool)

        self.runner.run(go())


@pytest.fixture(scope="module")
def started(ray_session: None, folder: str) -> Iterator[Started]:
    with asyncio.Runner() as runner:
        pool = RolloutPool(CONFIG, ray_launch(CONFIG))
        runner.run(pool.start(folder))
        yield Started(runner=runner, pool=pool)
        runner.run(_closed(pool))


async def _closed(pool: RolloutPool) -> None:
    pool.close()


def drawn_here(folder: str, issues: list[Issue]) -> dict[tuple[str, int], Sample]:
    """The same issues by an engine of this process, one after another."""
    engine = build(CONFIG, folder, WeightVersion(step=0))
    assert isinstance(engine, TorchEngine)
    found: dict[tuple[str, int], Sample] = {}
    for one in issues:
        engine.admit(one)
        while not engine.idle:
            found |= {(f.issue_id, f.sample.index): f.sample for f in engine.step()}
    return found


async def assert_same_samples(drawn: list[Drawn], expected: dict[tuple[str, int], Sample]) -> None:
    seen = 0
    for one in drawn:
        group = await opened(one.group)
        assert isinstance(group, Group)
        assert group.id == one.id
        for sample in group.samples:
            seen += 1
            np.testing.assert_array_equal(sample.token_ids, expected[one.id, sample.index].token_ids)
            np.testing.assert_array_equal(sample.logprobs, expected[one.id, sample.index].logprobs)
    assert seen == len(expected)


def long_issues(count: int) -> list[Issue]:
    return [
        issue(f"p{n}", prompt=f"{n}+{n}=", group_size=6, max_new_tokens=200, temperature=1.3)
        for n in range(count)
    ]


def pid_of(pool: RolloutPool, name: str) -> int:
    worker = pool.workers[name]
    assert isinstance(worker, RayWorker)
    pid = ray.get(worker.actor.__ray_call__.remote(lambda _: os.getpid()), timeout=30)
    assert isinstance(pid, int)
    return pid


def test_samples_are_the_same_whichever_process_draws_them(started: Started, folder: str) -> None:
    issues = [issue(f"p{n}", prompt=f"{n}*{n}=", group_size=4, max_new_tokens=40) for n in range(10)]

    async def use(pool: RolloutPool) -> None:
        drawn = await asyncio.gather(*(pool.draw(one) for one in issues))
        assert {d.worker for d in drawn} == {"rollout-0", "rollout-1"}
        await assert_same_samples(drawn, drawn_here(folder, issues))
        texts = await texts_of(drawn[0].texts)
        assert [len(t) > 0 for t in texts] == [True] * 4

    started.run(use, folder)


def test_a_small_group_comes_by_value_and_a_large_one_by_reference(started: Started, folder: str) -> None:
    small = issue("small", prompt="1+1=", group_size=4, max_new_tokens=40)
    large = issue("large", prompt="1+1=", group_size=24, max_new_tokens=200)

    async def use(pool: RolloutPool) -> None:
        drawn = await asyncio.gather(pool.draw(small), pool.draw(large))
        assert isinstance(drawn[0].group, Packed)
        assert isinstance(drawn[1].group, ray.ObjectRef)
        assert [len(await texts_of(one.texts)) for one in drawn] == [4, 24]
        await assert_same_samples(drawn, drawn_here(folder, [small, large]))

    started.run(use, folder)


def test_a_worker_killed_in_the_middle_of_a_draw_costs_nothing(started: Started, folder: str) -> None:
    issues = long_issues(8)

    async def use(pool: RolloutPool) -> None:
        caught_up: list[str] = []

        async def catch_up(name: str, worker: WorkerHandle) -> None:
            assert isinstance(worker, RayWorker)
            caught_up.append(name)

        pool.catch_up, before = catch_up, pool.restarts
        victim = pid_of(pool, "rollout-0")
        drawing = [asyncio.create_task(pool.draw(one)) for one in issues]
        while not (await pool.workers["rollout-0"].status()).in_flight:
            await asyncio.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        drawn = await asyncio.gather(*drawing)
        assert sorted(d.id for d in drawn) == sorted(i.id for i in issues)
        await assert_same_samples(drawn, drawn_here(folder, issues))
        assert pool.restarts == before + 1
        while not pool.all_ready:
            await asyncio.sleep(0.05)
        assert caught_up == ["rollout-0"]
        assert pid_of(pool, "rollout-0") != victim
        pool.catch_up = None

    started.run(use, folder)


def test_a_worker_stopped_by_the_system_is_killed_and_replaced(started: Started, folder: str) -> None:
    issues = long_issues(4)

    async def use(pool: RolloutPool) -> None:
        victim, before = pid_of(pool, "rollout-1"), pool.restarts
        os.kill(victim, signal.SIGSTOP)
        try:
            drawn = await asyncio.gather(*(pool.draw(one) for one in issues))
        finally:
            if Path(f"/proc/{victim}").exists():
                os.kill(victim, signal.SIGKILL)
        await assert_same_samples(drawn, drawn_here(folder, issues))
        assert pool.restarts == before + 1

    started.run(use, folder)


async def publish(pool: RolloutPool, state_folder: str, step: int) -> tuple[WeightManifest, object]:
    state = AutoModelForCausalLM.from_pretrained(state_folder).state_dict()
    manifest, buckets = pack(state.items(), step, 1 << 16)
    ticket = build_transport("object_store").send(manifest, buckets)
    for phase in ("stage", "flip"):
        for worker in pool.workers.values():
            assert isinstance(worker, RayWorker)
            arguments = (manifest, ticket) if phase == "stage" else (manifest.version,)
            answer = await getattr(worker.actor, phase).remote(*arguments)
            assert (answer.digest if phase == "stage" else answer) == manifest.version.digest
    return manifest, ticket


def test_weights_adopted_in_the_middle_of_a_draw_show_in_the_samples(
    started: Started, folder: str, other_folder: str
) -> None:
    async def use(pool: RolloutPool) -> None:
        drawing = [asyncio.create_task(pool.draw(one)) for one in long_issues(6)]
        while not sum([(await w.status()).in_flight for w in pool.workers.values()]):
            await asyncio.sleep(0.01)
        await publish(pool, other_folder, 1)
        drawn = await asyncio.gather(*drawing)
        groups = [await opened(d.group) for d in drawn]
        spans = {(s.oldest.step, s.newest.step) for g in groups if isinstance(g, Group) for s in g.samples}
        assert (0, 1) in spans
        assert spans <= {(0, 0), (0, 1), (1, 1)}
        after = issue("after", step=1)
        fresh = await pool.draw(after)
        assert (fresh.oldest.step, fresh.newest.step) == (1, 1)
        await assert_same_samples([fresh], drawn_here(other_folder, [after]))

    started.run(use, folder)


def test_errors_of_a_worker_arrive_as_themselves(started: Started, folder: str) -> None:
    async def use(pool: RolloutPool) -> None:
        with pytest.raises(DataError, match="prompt long"):
            await pool.draw(issue("long", prompt="1" * 250))

    started.run(use, folder)


def test_an_engine_that_fails_again_and_again_ends_the_run_with_its_first_cause(
    ray_session: None, folder: str
) -> None:
    config = replace(CONFIG, workers=1, max_restarts=1)
    options = {"runtime_env": {"env_vars": {"TREADLE_FAILPOINTS": "rollout.mid_generation=raise:bad card@3"}}}

    async def run() -> None:
        pool = RolloutPool(config, ray_launch(config, options))
        await pool.start(folder)
        try:
            with pytest.raises(
                RolloutError, match=r"2 workers failed .*first cause: worker rollout-0.*bad card"
            ):
                await pool.draw(issue("a", max_new_tokens=100))
        finally:
            pool.close()

    asyncio.run(run())
