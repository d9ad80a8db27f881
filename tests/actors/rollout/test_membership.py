"""Workers that join and leave while others draw, and those that the cluster has no place for. Without Ray."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.actors.rollout.test_pool import Bench, tokens_of
from tests.actors.rollout.tiny_models import issue

from treadle.actors.replaced import Replaced
from treadle.actors.rollout.handles import WorkerHandle
from treadle.actors.rollout.pool import RolloutPool
from treadle.platform.errors import BroadcastError, PlacementError, PoisonedError
from treadle.platform.records import Issue


def calm_bench(**changes: Any) -> Bench:
    """On a crowded machine a worker may be silent for a while; none of these tests is about that."""
    return Bench(**{"silence_deadline_s": 20.0, **changes})


ISSUES = [issue(f"p{n}", max_new_tokens=40) for n in range(12)]


async def drawn_by(pool: RolloutPool, issues: list[Issue] = ISSUES) -> dict[str, list[list[int]]]:
    drawn = await asyncio.gather(*(pool.draw(one) for one in issues))
    assert [d.id for d in drawn] == [one.id for one in issues]
    return {d.id: await tokens_of(d.group) for d in drawn}


def test_samples_are_the_same_while_workers_join_and_leave() -> None:
    calm, elastic = calm_bench(workers=1), calm_bench(step_s=0.01, workers=1)
    expected: dict[str, list[list[int]]] = {}

    async def undisturbed(pool: RolloutPool) -> None:
        expected.update(await drawn_by(pool))

    async def resized(pool: RolloutPool) -> None:
        drawing = asyncio.create_task(drawn_by(pool))
        await elastic.until_drawing()
        assert list((await pool.resize(3)).joined) == ["rollout-1", "rollout-2"]
        later = asyncio.create_task(drawn_by(pool, [issue(f"q{n}", max_new_tokens=40) for n in range(6)]))
        await asyncio.sleep(0.05)
        shrunk = await pool.resize(1)
        assert (list(shrunk.left), list(shrunk.handed_back)) == (["rollout-1", "rollout-2"], [])
        assert list(pool.workers) == ["rollout-0"]
        await later
        assert await drawing == expected
        assert pool.restarts == 0
        assert all(worker.drawn_ids for worker in elastic.workers), "each drew something"

    calm.run(undisturbed)
    elastic.run(resized)


def test_what_a_leaver_does_not_finish_in_time_is_drawn_by_others_under_the_same_ids() -> None:
    calm, bench = calm_bench(), calm_bench(step_s=0.02, drain_deadline_s=0.1)
    expected: dict[str, list[list[int]]] = {}

    async def undisturbed(pool: RolloutPool) -> None:
        expected.update(await drawn_by(pool))

    async def drained(pool: RolloutPool) -> None:
        drawing = asyncio.create_task(drawn_by(pool))
        await bench.until_drawing()
        shrunk = await pool.resize(1)
        assert shrunk.handed_back
        assert set(shrunk.handed_back) <= {one.id for one in ISSUES}
        assert await drawing == expected
        assert pool.restarts == 0, "nobody failed"
        assert (await pool.draw(ISSUES[0])).id == ISSUES[0].id, "no prompt is suspected"

    calm.run(undisturbed)
    bench.run(drained)


def test_a_leaver_that_dies_is_not_replaced() -> None:
    bench = calm_bench(step_s=0.02)

    async def use(pool: RolloutPool) -> None:
        drawing = asyncio.create_task(drawn_by(pool))
        await bench.until_drawing()
        leaving = asyncio.create_task(pool.resize(1))
        await asyncio.sleep(0.02)
        bench.workers[1].kill()
        assert list((await leaving).left) == ["rollout-1"]
        await drawing
        assert len(bench.workers) == 2
        assert pool.restarts == 0

    bench.run(use)


def test_one_that_joins_has_the_newest_weights_before_it_draws_and_the_coordinator_knows_who_is_there() -> (
    None
):
    bench = calm_bench(workers=1)
    story: list[str] = []

    async def catch_up(name: str, _: WorkerHandle) -> None:
        await asyncio.sleep(0.05)
        story.append(f"{name} caught up, {len(bench.workers[-1].drawn_ids)} drawn")

    async def forget(name: str) -> None:
        story.append(f"{name} forgotten, {'dead' if bench.workers[-1].dead.done() else 'alive'}")

    async def use(pool: RolloutPool) -> None:
        pool.catch_up, pool.forget = catch_up, forget
        joining = asyncio.create_task(pool.resize(2))
        await drawn_by(pool)
        await joining
        await pool.resize(1)
        assert story == ["rollout-1 caught up, 0 drawn", "rollout-1 forgotten, alive"]
        assert bench.workers[-1].dead.done()

    bench.run(use)


def test_one_that_cannot_join_is_named_and_costs_nothing() -> None:
    bench = calm_bench(workers=1, max_restarts=0)

    async def refuse(name: str, _: WorkerHandle) -> None:
        if name == "rollout-1":
            raise BroadcastError("broadcast.catch_up: the network is down.")

    async def use(pool: RolloutPool) -> None:
        pool.catch_up = refuse
        resized = await pool.resize(3)
        assert list(resized.joined) == ["rollout-2"]
        assert dict(resized.refused) == {"rollout-1": "broadcast.catch_up: the network is down."}
        assert list(pool.workers) == ["rollout-0", "rollout-2"]
        assert pool.ready == 2
        pool.catch_up = None
        assert list((await pool.resize(3)).joined) == ["rollout-1"], "the lowest free number"
        assert list((await pool.resize(1)).left) == ["rollout-1", "rollout-2"]
        await drawn_by(pool)

    bench.run(use)


def test_a_worker_without_a_place_is_refused_with_the_diagnosis() -> None:
    bench = calm_bench(workers=1)

    async def use(pool: RolloutPool) -> None:
        launch = pool._launch

        def full(name: str, slots: int) -> WorkerHandle:
            raise PlacementError("Impossible placement: no node has 4 GPU.")

        pool._launch = full
        assert dict((await pool.resize(2)).refused) == {
            "rollout-1": "Impossible placement: no node has 4 GPU."
        }
        pool._launch = launch
        assert list((await pool.resize(2)).joined) == ["rollout-1"]

    bench.run(use)


@pytest.mark.usefixtures("quick")
def test_a_run_goes_on_with_fewer_while_the_cluster_has_no_place_and_grows_back() -> None:
    bench = calm_bench(max_restarts=1)
    placed, missing, told = False, list[tuple[str, str]](), list[Replaced]()

    async def has_place(_: str) -> bool:
        return placed

    async def use(pool: RolloutPool) -> None:
        nonlocal placed
        pool.placed, pool.missing, pool.told = has_place, lambda *said: missing.append(said), told.append
        bench.workers[1].kill()
        while not missing:
            await asyncio.sleep(0.01)
        assert [name for name, _ in missing] == ["rollout-1"]
        assert pool.ready == 1
        await drawn_by(pool)
        await asyncio.sleep(0.2)
        assert len(missing) == 1, "told once"
        placed = True
        while pool.ready < 2:
            await asyncio.sleep(0.01)
        assert [one.name for one in told] == ["rollout-1"]
        await drawn_by(pool)
        assert bench.workers[-1].drawn_ids

    bench.run(use)


@pytest.mark.usefixtures("quick")
def test_a_place_that_is_lost_while_the_successor_starts_there_costs_no_further_restart() -> None:
    """A node's death is known to the pool before the cluster has noticed it."""
    bench = calm_bench(max_restarts=1)
    held, started = True, 0

    async def has_place(_: str) -> bool:
        return held

    async def use(pool: RolloutPool) -> None:
        nonlocal held
        never = asyncio.Event()

        async def start(name: str, _: WorkerHandle) -> None:
            nonlocal started
            started += 1
            if started == 1:
                await never.wait()

        pool.placed, pool.catch_up = has_place, start
        bench.workers[1].kill()
        while not started:
            await asyncio.sleep(0.01)
        held = False
        await asyncio.sleep(0.2)
        assert pool.ready == 1
        held = True
        while pool.ready < 2:
            await asyncio.sleep(0.01)
        assert (started, pool.restarts) == (2, 1)
        await drawn_by(pool)

    bench.run(use)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that is asked more often."""
    monkeypatch.setattr("treadle.actors.rollout.membership._LOOK_S", 0.02)
    monkeypatch.setattr("treadle.actors.rollout.membership._NO_PLACE_S", 0.1)


def test_a_prompt_that_ends_workers_is_still_found_when_some_leave() -> None:
    bench = calm_bench(step_s=0.002, workers=3)
    bench.poison = "p2"

    async def use(pool: RolloutPool) -> None:
        drawing = asyncio.gather(*(pool.draw(one) for one in ISSUES), return_exceptions=True)
        await bench.until_drawing()
        await pool.resize(1)
        drawn = await drawing
        assert [isinstance(one, PoisonedError) for one in drawn] == [n == 2 for n in range(12)]

    bench.run(use)
