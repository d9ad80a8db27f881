"""One worker without Ray: draws, adoption in two phases, failures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.actors.rollout.tiny_models import issue
from tests.fakes import FakeEngine, weights_of

from treadle.actors.broadcast.buckets import pack
from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.engine_loop import EngineFailedError, WorkerBehindError
from treadle.actors.rollout.worker import RolloutWorker
from treadle.platform.errors import BroadcastError, DataError, MismatchError, RolloutError
from treadle.platform.records import WeightManifest, WeightVersion

CONFIG = RolloutConfig(slots=16, max_context_tokens=64)
V0 = WeightVersion(step=0)


def fetch_given(_: WeightManifest, ticket: object, __: float) -> list[NDArray[np.uint8]]:
    assert isinstance(ticket, list)
    return ticket


def with_worker(step_s: float, use: Callable[[RolloutWorker, list[FakeEngine]], Awaitable[Any]]) -> Any:
    engines: list[FakeEngine] = []

    def build(config: RolloutConfig, _: str, version: WeightVersion) -> FakeEngine:
        engines.append(FakeEngine(config, version, step_s))
        return engines[-1]

    async def run() -> Any:
        worker = RolloutWorker("w", CONFIG, build=build, fetch=fetch_given)
        await worker.load("folder", V0)
        try:
            return await asyncio.wait_for(use(worker, engines), 20)
        finally:
            worker.close()

    return asyncio.run(run())


def test_a_group_comes_back_whole_and_in_sample_order() -> None:
    async def use(worker: RolloutWorker, _: list[FakeEngine]) -> None:
        summary, group, texts = await worker.draw(issue("a", group_size=6), 0)
        assert [s.index for s in group.samples] == list(range(6))
        assert summary.lengths == tuple(s.drawn_tokens for s in group.samples)
        assert [len(t) for t in texts] == list(summary.lengths)
        assert (summary.id, summary.worker, summary.group, summary.texts) == ("test/a", "w", None, None)

    with_worker(0.0, use)


def test_draws_run_side_by_side_and_an_issue_in_flight_is_joined() -> None:
    async def use(worker: RolloutWorker, engines: list[FakeEngine]) -> None:
        one = issue("a", group_size=3)
        answers = await asyncio.gather(
            worker.draw(one, 0), worker.draw(one, 0), worker.draw(issue("b", group_size=3), 0)
        )
        assert answers[0][1] is answers[1][1]
        assert answers[2][0].id == "test/b"
        assert engines[0].steps <= 21

    with_worker(0.002, use)


def test_an_issue_left_over_from_before_a_rollback_is_not_joined() -> None:
    """The run went back to a commit while the group was being drawn: it comes again, for other weights."""

    async def use(worker: RolloutWorker, engines: list[FakeEngine]) -> None:
        old = issue("a", group_size=3, max_new_tokens=40)
        left_over = asyncio.create_task(worker.draw(old, 0))
        while not engines[0].steps:
            await asyncio.sleep(0.002)
        manifest, buckets = pack(weights_of(3.0).items(), 1, 1 << 20)
        await worker.stage(manifest, buckets)
        await worker.flip(manifest.version)
        summary, _, _ = await worker.draw(replace(old, version=manifest.version), 1)
        assert left_over.done()
        assert summary.oldest.step == summary.newest.step == 1
        assert (await left_over)[0].oldest.step == 0

    with_worker(0.005, use)


def test_weights_are_staged_while_drawing_and_adopted_between_steps() -> None:
    async def use(worker: RolloutWorker, engines: list[FakeEngine]) -> None:
        manifest, buckets = pack(weights_of(3.0).items(), 1, 1 << 20)
        drawing = asyncio.create_task(worker.draw(issue("a", group_size=8, max_new_tokens=40), 0))
        while not engines[0].steps:
            await asyncio.sleep(0.002)
        assert (await worker.stage(manifest, buckets)).digest == manifest.version.digest
        assert worker.status().version == V0
        assert await worker.flip(manifest.version) == manifest.version.digest
        assert worker.status().version.digest == manifest.version.digest
        _, group, _ = await drawing
        assert {s.oldest.step for s in group.samples} == {0}
        assert max(s.newest.step for s in group.samples) == 1

    with_worker(0.005, use)


def test_a_flip_without_a_stage_is_refused() -> None:
    async def use(worker: RolloutWorker, _: list[FakeEngine]) -> None:
        manifest, buckets = pack(weights_of(3.0).items(), 1, 1 << 20)
        with pytest.raises(BroadcastError, match="version 1 is not staged"):
            await worker.flip(manifest.version)
        await worker.stage(manifest, buckets)
        with pytest.raises(BroadcastError, match="version 2 is not staged"):
            await worker.flip(WeightVersion(step=2))

    with_worker(0.0, use)


def test_weights_of_another_model_leave_the_worker_drawing_with_the_old_ones() -> None:
    async def use(worker: RolloutWorker, _: list[FakeEngine]) -> None:
        manifest, buckets = pack([("other", torch.ones(3))], 1, 1 << 20)
        await worker.stage(manifest, buckets)
        with pytest.raises(MismatchError):
            await worker.flip(manifest.version)
        summary, _, _ = await worker.draw(issue("a"), 0)
        assert summary.newest.step == 0

    with_worker(0.0, use)


def test_an_engine_that_breaks_while_adopting_draws_no_more() -> None:
    """Half-copied weights must never draw."""

    def cut_off() -> Iterator[tuple[str, torch.Tensor]]:
        raise IndexError("cut off")

    async def use(worker: RolloutWorker, _: list[FakeEngine]) -> None:
        manifest, buckets = pack(weights_of(3.0).items(), 1, 1 << 20)
        await worker.stage(manifest, buckets)
        worker._standby.tensors = cut_off  # type: ignore[method-assign]
        with pytest.raises(IndexError):
            await worker.flip(manifest.version)
        with pytest.raises(EngineFailedError, match="IndexError"):
            await worker.draw(issue("a"), 0)
        assert worker.status().version == V0

    with_worker(0.0, use)


def test_a_draw_that_needs_newer_weights_is_refused() -> None:
    async def use(worker: RolloutWorker, _: list[FakeEngine]) -> None:
        with pytest.raises(WorkerBehindError, match="holds version 0, test/a needs 1"):
            await worker.draw(issue("a", step=1), 1)

    with_worker(0.0, use)


def test_a_failing_engine_fails_its_issues_and_says_so_ever_after() -> None:
    async def use(worker: RolloutWorker, engines: list[FakeEngine]) -> None:
        engines[0].fail_at_step = 3
        issues = [issue(name, group_size=4, max_new_tokens=40) for name in "ab"]
        answers = await asyncio.gather(*(worker.draw(i, 0) for i in issues), return_exceptions=True)
        assert all(isinstance(a, EngineFailedError) and "out of memory" in str(a) for a in answers)
        with pytest.raises(EngineFailedError, match="out of memory"):
            await worker.draw(issue("c"), 0)
        assert "out of memory" in worker.status().failure
        await worker.load("folder", V0)
        assert (await worker.draw(issue("c"), 0))[0].id == "test/c"

    with_worker(0.0, use)


def test_a_prompt_that_does_not_fit_fails_alone() -> None:
    async def use(worker: RolloutWorker, _: list[FakeEngine]) -> None:
        good, bad = await asyncio.gather(
            worker.draw(issue("good"), 0),
            worker.draw(issue("long", prompt="1" * 60), 0),
            return_exceptions=True,
        )
        assert isinstance(bad, DataError)
        assert "prompt long" in str(bad)
        assert not isinstance(good, BaseException)

    with_worker(0.0, use)


def test_loading_another_model_fails_what_was_in_flight() -> None:
    async def use(worker: RolloutWorker, engines: list[FakeEngine]) -> None:
        drawing = asyncio.create_task(worker.draw(issue("a", group_size=8, max_new_tokens=40), 0))
        while not engines[0].steps:
            await asyncio.sleep(0.002)
        await worker.load("next", WeightVersion(step=5))
        with pytest.raises(RolloutError, match="switched to another model"):
            await drawing
        assert worker.status().version.step == 5
        assert len(engines) == 2

    with_worker(0.01, use)


def test_status_tells_phase_and_progress() -> None:
    async def use(worker: RolloutWorker, engines: list[FakeEngine]) -> None:
        drawing = asyncio.create_task(worker.draw(issue("a", max_new_tokens=40), 0))
        while not engines[0].steps:
            await asyncio.sleep(0.002)
        busy = worker.status()
        assert (busy.phase, busy.in_flight) == ("drawing", 1)
        await drawing
        deadline = time.monotonic() + 5
        while worker.status().phase != "idle" and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        idle = worker.status()
        assert (idle.phase, idle.in_flight, idle.failure) == ("idle", 0, "")
        assert idle.progress > busy.progress
        assert idle.drawn_tokens > 0

    with_worker(0.005, use)
