"""The pool without Ray: routing, replacement, deadlines."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import numpy as np
import pytest
from tests.actors.rollout.pool_bench import Bench, tokens_of
from tests.actors.rollout.tiny_models import issue
from tests.fakes import FakeEngine, LocalWorker, weights_of

from treadle.actors.replaced import Replaced
from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.handles import WorkerHandle
from treadle.actors.rollout.pool import RolloutPool
from treadle.actors.rollout.supervision import verdict
from treadle.actors.rollout.worker import WorkerStatus
from treadle.platform.errors import DataError, DeadlineError, PoisonedError, RolloutError
from treadle.platform.records import Drawn, WeightVersion


def test_draws_spread_over_the_least_loaded_workers() -> None:
    bench = Bench(step_s=0.002)

    async def use(pool: RolloutPool) -> None:
        drawn = await asyncio.gather(*(pool.draw(issue(f"p{n}")) for n in range(8)))
        assert [d.id for d in drawn] == [f"test/p{n}" for n in range(8)]
        assert [len(w.drawn_ids) for w in bench.workers] == [4, 4]

    bench.run(use)


def test_draws_avoid_a_node_that_leaves_while_another_can_draw() -> None:
    bench = Bench(step_s=0.002)

    async def use(pool: RolloutPool) -> None:
        leaver, stayer = bench.workers
        leaver.node, stayer.node = "spot", "reserved"
        while not all(status.node for status in pool.statuses.values()) or len(pool.statuses) < 2:
            await asyncio.sleep(0.01)
        pool.avoid(["spot"])
        await asyncio.gather(*(pool.draw(issue(f"p{n}")) for n in range(8)))
        assert [len(leaver.drawn_ids), len(stayer.drawn_ids)] == [0, 8]
        pool.avoid(["spot", "reserved"])  # better there than nowhere
        await asyncio.gather(*(pool.draw(issue(f"q{n}")) for n in range(8)))
        assert [len(leaver.drawn_ids), len(stayer.drawn_ids)] == [4, 12]

    bench.run(use)


def test_a_killed_workers_issues_are_drawn_again_with_the_same_samples() -> None:
    calm, rough = Bench(), Bench(step_s=0.01)
    expected: dict[str, list[list[int]]] = {}
    issues = [issue(f"p{n}", max_new_tokens=40) for n in range(6)]

    async def undisturbed(pool: RolloutPool) -> None:
        for one in issues:
            expected[one.id] = await tokens_of((await pool.draw(one)).group)

    async def disturbed(pool: RolloutPool) -> None:
        drawing = [asyncio.create_task(pool.draw(one)) for one in issues]
        await rough.until_drawing()
        rough.workers[0].kill()
        drawn = await asyncio.gather(*drawing)
        assert {d.id: await tokens_of(d.group) for d in drawn} == expected
        assert pool.restarts == 1

    calm.run(undisturbed)
    rough.run(disturbed)


def test_a_failed_engine_is_replaced() -> None:
    bench = Bench(workers=1)
    bench.fail_at_step = 2

    async def use(pool: RolloutPool) -> None:
        bench.fail_at_step = -1  # only the first engine fails
        told: list[Replaced] = []
        pool.told = told.append
        drawn = await pool.draw(issue("a", max_new_tokens=40))
        assert drawn.id == "test/a"
        assert pool.restarts == 1
        assert [(one.role, one.name) for one in told] == [("rollout", "rollout-0")]
        assert "fail" in told[0].cause
        assert told[0].seconds > 0

    bench.run(use)


def test_the_first_cause_is_named_when_the_budget_is_spent() -> None:
    bench = Bench(workers=1, max_restarts=2)
    bench.fail_at_step = 2

    async def use(pool: RolloutPool) -> None:
        with pytest.raises(
            RolloutError, match=r"3 workers failed .*first cause: worker rollout-0.*out of memory"
        ):
            await pool.draw(issue("a", max_new_tokens=40))
        with pytest.raises(RolloutError, match="first cause"):
            await pool.draw(issue("b"))

    bench.run(use)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_prompt_that_ends_every_worker_is_found_alone_and_refused_from_then_on(workers: int) -> None:
    bench = Bench(step_s=0.002, workers=workers)
    bench.poison = "p2"

    async def use(pool: RolloutPool) -> None:
        issues = [issue(f"p{n}", max_new_tokens=40) for n in range(6)]
        drawn = await asyncio.gather(*(pool.draw(one) for one in issues), return_exceptions=True)
        poisoned = drawn.pop(2)
        assert isinstance(poisoned, PoisonedError)
        assert "prompt p2 ended 3 workers" in str(poisoned)
        assert "choked" in str(poisoned)
        assert [d.id for d in drawn if isinstance(d, Drawn)] == [f"test/p{n}" for n in (0, 1, 3, 4, 5)]
        assert pool.restarts == 3
        with pytest.raises(PoisonedError, match="prompt p2"):
            await pool.draw(issue("p2"))
        assert pool.restarts == 3
        assert (await pool.draw(issue("p9"))).id == "test/p9"

    bench.run(use)


def test_a_silent_worker_is_replaced_and_its_draw_repeated() -> None:
    bench = Bench(step_s=0.01, workers=1)

    async def use(pool: RolloutPool) -> None:
        bench.step_s = 0.0
        bench.workers[0].frozen = True
        bench.engines[0]._step_s = 3600.0
        drawing = asyncio.create_task(pool.draw(issue("a", max_new_tokens=40)))
        assert (await drawing).id == "test/a"
        assert len(bench.workers) == 2

    # The frozen engine's thread is a daemon and sleeps on.
    bench.run(use)


def test_a_silent_worker_beyond_the_budget_is_named_with_what_it_was_asked_for() -> None:
    bench = Bench(step_s=0.01, workers=1, max_restarts=0)

    async def use(pool: RolloutPool) -> None:
        bench.workers[0].frozen = True
        bench.engines[0]._step_s = 3600.0
        with pytest.raises(RolloutError) as error:
            await pool.draw(issue("a", max_new_tokens=40))
        for words in ("worker rollout-0 has been silent for", "asked to draw test/a", "a fake that froze"):
            assert words in error.value.message
        for setting in ("rollout.max_restarts=0", "rollout.silence_deadline_s"):
            assert setting in error.value.remedy

    bench.run(use)


def test_an_engine_that_stands_still_is_replaced_although_its_worker_answers() -> None:
    bench = Bench(workers=1)

    async def use(pool: RolloutPool) -> None:
        bench.engines[0]._step_s = 3600.0
        assert (await pool.draw(issue("a"))).id == "test/a"
        assert len(bench.workers) == 2

    bench.run(use)


def test_a_replacement_draws_only_after_it_caught_up() -> None:
    bench = Bench(step_s=0.005, workers=1)
    order: list[str] = []

    async def use(pool: RolloutPool) -> None:
        async def catch_up(name: str, worker: WorkerHandle) -> None:
            assert isinstance(worker, LocalWorker)
            await asyncio.sleep(0.2)
            engine = bench.engines[-1]
            version = WeightVersion(step=4)
            await asyncio.wrap_future(
                worker.worker._loop.adopt(version, lambda e: e.adopt(version, iter(weights_of(2.0).items())))
            )
            assert not worker.drawn_ids
            assert engine.steps == 0
            order.append(name)

        pool.catch_up = catch_up
        bench.workers[0].kill()
        drawn = await pool.draw(issue("a", step=4))
        assert order == ["rollout-0"]
        assert drawn.oldest.step == 4

    bench.run(use)


def test_a_worker_that_is_being_started_is_none_of_those_that_hold_a_model() -> None:
    """A new weight coordinator would publish to it before it has one."""
    bench = Bench(workers=2)

    async def use(pool: RolloutPool) -> None:
        assert list(pool.loaded) == ["rollout-0", "rollout-1"]
        bench.starting_s = 0.3
        bench.workers[0].kill()
        while pool.restarts == 0:
            await asyncio.sleep(0.01)
        assert list(pool.loaded) == ["rollout-1"]
        assert list(pool.workers) == ["rollout-0", "rollout-1"]
        while not pool.all_ready:
            await asyncio.sleep(0.01)
        assert list(pool.loaded) == ["rollout-0", "rollout-1"]

    bench.run(use)


def test_a_worker_left_behind_gets_no_draws_that_need_newer_weights() -> None:
    bench = Bench()

    async def use(pool: RolloutPool) -> None:
        version = WeightVersion(step=1)
        ahead = bench.workers[1].worker._loop
        await asyncio.wrap_future(
            ahead.adopt(version, lambda e: e.adopt(version, iter(weights_of(2.0).items())))
        )
        drawn = await asyncio.gather(*(pool.draw(issue(f"p{n}", step=1)) for n in range(6)))
        assert {d.worker for d in drawn} == {"rollout-1"}
        assert {d.oldest.step for d in drawn} == {1}
        pool.max_lag_steps = 1
        await asyncio.sleep(0.1)  # a refusal keeps draws away for a moment
        drawn = await asyncio.gather(*(pool.draw(issue(f"q{n}", step=1)) for n in range(6)))
        assert {d.worker for d in drawn} == {"rollout-0", "rollout-1"}

    bench.run(use)


def test_a_draw_past_its_deadline_names_where_it_was() -> None:
    bench = Bench(workers=1, step_s=0.05, draw_deadline_s=0.3)

    async def use(pool: RolloutPool) -> None:
        with pytest.raises(DeadlineError, match=r"test/a \(prompt a, version 0\).*in flight on rollout-0"):
            await pool.draw(issue("a", max_new_tokens=50, temperature=0.0))
        with pytest.raises(DeadlineError, match=r"Refused before: .* holds version 0, test/b needs 9"):
            await pool.draw(issue("b", step=9))

    bench.run(use)


def test_a_prompt_that_does_not_fit_is_the_callers_error_and_costs_no_worker() -> None:
    bench = Bench()

    async def use(pool: RolloutPool) -> None:
        with pytest.raises(DataError, match="prompt long"):
            await pool.draw(issue("long", prompt="1" * 60))
        assert pool.restarts == 0

    bench.run(use)


def test_every_worker_answers_the_probe_and_a_dead_one_is_left_out() -> None:
    bench = Bench()

    async def use(pool: RolloutPool) -> None:
        sequences = [np.array([1, 2, 3], dtype=np.int32), np.array([4, 5], dtype=np.int32)]
        found = await pool.logprobs(sequences)
        assert set(found) == {"rollout-0", "rollout-1"}
        assert all(values.shape == (3,) for values in found.values())
        bench.workers[0].kill()
        assert set(await pool.logprobs(sequences)) == {"rollout-1"}

    bench.run(use)


def test_all_workers_switch_to_another_model() -> None:
    bench = Bench()

    async def use(pool: RolloutPool) -> None:
        await pool.load("next", WeightVersion(step=3))
        drawn = await pool.draw(issue("a", step=3))
        assert drawn.newest.step == 3
        assert len(bench.engines) == 4

    bench.run(use)


def test_a_worker_that_never_starts_is_a_deadline_error() -> None:
    bench = Bench(start_deadline_s=0.2)
    build = bench.build

    def slow(config: RolloutConfig, folder: str, version: WeightVersion) -> FakeEngine:

        time.sleep(1.0)
        return build(config, folder, version)

    bench.build = slow  # type: ignore[method-assign]

    async def use(pool: RolloutPool) -> None:
        raise AssertionError("the pool must not start")

    with pytest.raises(DeadlineError, match=r"rollout/start: worker rollout-\d did not answer within 0.2 s"):
        bench.run(use)


def test_a_worker_that_fetches_weights_forever_is_replaced() -> None:
    config = RolloutConfig(stage_deadline_s=4.0)
    status = WorkerStatus(
        name="rollout-0", phase="idle", version=WeightVersion(step=2), in_flight=0, progress=9, drawn_tokens=9,
        silent_s=0.1, failure="", where="in _stage (actors/rollout/worker.py:98)", fetching_s=7.0,
    )  # fmt: skip
    assert verdict(status, config) is None, "one repetition is allowed"
    reason = verdict(dataclasses.replace(status, fetching_s=8.5), config)
    assert reason is not None
    assert "rollout-0 has been fetching weights for 8 s: in _stage" in reason.message
    assert "rollout.stage_deadline_s=4" in reason.remedy
