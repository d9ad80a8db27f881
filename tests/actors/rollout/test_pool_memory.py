"""The pool without Ray: workers whose node runs out of memory."""

from __future__ import annotations

import asyncio

import pytest
from tests.actors.rollout.pool_bench import Bench, tokens_of
from tests.actors.rollout.tiny_models import issue

from treadle.actors.replaced import Replaced
from treadle.actors.rollout.handles import WorkerDiedError
from treadle.actors.rollout.pool import RolloutPool
from treadle.cluster.backoff import BackOff, BackOffs
from treadle.platform.errors import RolloutError


def test_an_engine_without_memory_is_told_with_what_helps() -> None:
    bench = Bench(workers=1, max_restarts=0)
    bench.fail_at_step = 2

    async def use(pool: RolloutPool) -> None:
        with pytest.raises(RolloutError, match="it ran out of memory, MemoryError") as failed:
            await pool.draw(issue("a", max_new_tokens=40))
        assert "Lower rollout.slots" in failed.value.remedy

    bench.run(use)


def test_a_worker_that_the_kernel_ended_is_told_so_by_its_successor_and_in_the_budget() -> None:
    bench = Bench(step_s=0.005, workers=1, max_restarts=1)
    bench.starting_s = 0.1
    told: list[Replaced] = []

    async def use(pool: RolloutPool) -> None:
        pool.told = told.append
        bench.workers[0].kill()  # before its first heartbeat
        first = asyncio.create_task(pool.draw(issue("a", max_new_tokens=40)))
        while len(bench.workers) < 2:
            await asyncio.sleep(0.01)
        bench.workers[1].kernel_kills = 1
        await first
        bench.workers[1].kill()
        with pytest.raises(
            RolloutError, match=r"the kernel ended a process there at that time\. Lower rollout"
        ):
            await pool.draw(issue("a", max_new_tokens=40))

    bench.run(use)
    assert "its node ran out of memory: the kernel ended a process there" in told[0].cause


def test_of_workers_on_a_node_without_memory_the_one_that_has_grown_is_replaced_too() -> None:
    """Ray ends others, again and again, as long as it lives."""
    bench = Bench(workers=3)
    told: list[Replaced] = []

    async def use(pool: RolloutPool) -> None:
        pool.told = told.append
        for worker, gibibytes in zip(bench.workers, (1, 1, 5), strict=True):
            worker.resident_bytes = gibibytes * 2**30
        while len(pool.statuses) < 3 or not all(s.resident_bytes for s in pool.statuses.values()):
            await asyncio.sleep(0.01)
        bench.workers[0].gone = WorkerDiedError("its node ran out of memory, and Ray ended its process")
        while len(told) < 2:
            await asyncio.sleep(0.01)

    bench.run(use)
    causes = {one.name: one.cause for one in told}
    assert set(causes) == {"rollout-0", "rollout-2"}
    assert "worker rollout-2 holds 5.0 GiB, far more than worker rollout-0 did" in causes["rollout-2"]


def test_a_worker_that_runs_out_of_memory_comes_back_with_half_its_slots_until_they_fit() -> None:
    bench = Bench(workers=1, slots=64, max_restarts=5)
    bench.most_slots, bench.back_offs = 16, BackOffs(4)
    lowered: list[BackOff] = []
    told: list[Replaced] = []

    async def use(pool: RolloutPool) -> None:
        pool.slots.lowered, pool.told = lowered.append, told.append
        drawn = await pool.draw(issue("a", max_new_tokens=40))
        assert len(drawn.lengths) == len(await tokens_of(drawn.group))

    bench.run(use)
    assert bench.slots == [64, 32, 16]
    assert [(one.name, one.before, one.after) for one in lowered] == [
        ("rollout-0", 64, 32),
        ("rollout-0", 32, 16),
    ]
    assert lowered[-1].sentence == (
        "rollout-0 goes on with rollout.slots=16 instead of 32, the recipe says 64"
    )
    assert all("memory for 16 slots" in one.cause for one in told)


def test_the_slots_of_others_stay_and_those_that_are_used_up_end_the_pool_with_what_was_in_force() -> None:
    bench = Bench(workers=2, slots=32, max_restarts=3)
    bench.most_slots, bench.back_offs = 4, BackOffs(1)
    told: list[Replaced] = []

    async def use(pool: RolloutPool) -> None:
        pool.told = told.append
        with pytest.raises(RolloutError) as failed:
            await pool.draw(issue("a", max_new_tokens=40))
        assert "failed last, with rollout.slots=16." in failed.value.message
        assert "Lower rollout.slots" in failed.value.remedy

    bench.run(use)
    assert sorted(bench.slots[2:]) == [16, 16, 16]
    stays = "it was lowered recovery.max_oom_backoffs=1 times from 32"
    assert any(f"rollout.slots=16 stays in force for {one.name}: {stays}" in one.cause for one in told)


@pytest.mark.parametrize(
    ("limit", "matter", "why"),
    [(0, False, "recovery.oom_backoff=false"), (4, True, "samples depend on it on this machine")],
)
def test_slots_stay_where_they_are_to_or_where_samples_would_change(
    limit: int, matter: bool, why: str
) -> None:
    bench = Bench(workers=1, max_restarts=1)
    bench.fail_at_step, bench.slots_matter, bench.back_offs = 2, matter, BackOffs(limit)
    told: list[Replaced] = []

    async def use(pool: RolloutPool) -> None:
        pool.told = told.append
        bench.fail_at_step = -1  # of the replacement
        await pool.draw(issue("a", max_new_tokens=40))

    bench.run(use)
    assert bench.slots == [16, 16]
    assert told[0].cause.endswith(f"rollout.slots=16 stays in force for rollout-0: {why}")


def test_a_worker_that_the_kernel_ended_gives_way_to_one_with_fewer_slots_before_it_draws() -> None:
    """Only the successor knows that its node has no memory: it is up by then, with too many."""
    bench = Bench(step_s=0.005, workers=1, max_restarts=1)
    bench.starting_s, bench.back_offs = 0.1, BackOffs(4)

    async def use(pool: RolloutPool) -> None:
        bench.workers[0].kill()
        drawing = asyncio.create_task(pool.draw(issue("a", max_new_tokens=40)))
        while len(bench.workers) < 2:
            await asyncio.sleep(0.01)
        bench.workers[1].kernel_kills = 1
        await drawing
        assert pool.restarts == 1, "it costs one replacement, not two"

    bench.run(use)
    assert bench.slots == [16, 16, 8]
    assert [len(worker.drawn_ids) for worker in bench.workers[1:]] == [0, 1]


def test_the_worker_that_has_grown_gets_fewer_slots_and_not_the_one_that_was_ended() -> None:
    bench = Bench(workers=2)
    bench.back_offs = BackOffs(4)
    lowered: list[BackOff] = []

    async def use(pool: RolloutPool) -> None:
        pool.slots.lowered = lowered.append
        for worker, gibibytes in zip(bench.workers, (1, 5), strict=True):
            worker.resident_bytes = gibibytes * 2**30
        while len(pool.statuses) < 2 or not all(s.resident_bytes for s in pool.statuses.values()):
            await asyncio.sleep(0.01)
        bench.workers[0].gone = WorkerDiedError("its node ran out of memory, and Ray ended its process")
        while pool.restarts < 2 or not pool.all_ready:
            await asyncio.sleep(0.01)

    bench.run(use)
    assert [one.name for one in lowered] == ["rollout-1"]
    assert sorted(bench.slots) == [8, 16, 16, 16]
