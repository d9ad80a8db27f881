"""The pool without Ray: workers whose node runs out of memory."""

from __future__ import annotations

import asyncio

import pytest
from tests.actors.rollout.pool_bench import Bench
from tests.actors.rollout.tiny_models import issue

from treadle.actors.replaced import Replaced
from treadle.actors.rollout.handles import WorkerDiedError
from treadle.actors.rollout.pool import RolloutPool
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
