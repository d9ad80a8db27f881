"""What every `Rollouts` (and `Scorer`) promises, against pools of fake and of real engines, without and with
Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from tests.actors.rollout.tiny_models import issue, write_model
from tests.fakes import FakeEngine, LocalWorker, local_launch

from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.engines import build_engine
from treadle.actors.rollout.handles import Launch
from treadle.actors.rollout.pool import RolloutPool
from treadle.platform.contracts import Rollouts, Scorer
from treadle.platform.errors import DataError, DeadlineError
from treadle.platform.records import Drawn, Group, Issue, WeightVersion
from treadle.workflows.roles import opened, texts_of

CONFIG = RolloutConfig(workers=2, slots=16, max_context_tokens=96, draw_deadline_s=60.0, heartbeat_s=0.5)


def fake_launch(_: str) -> Launch:
    workers: list[LocalWorker] = []
    return local_launch(CONFIG, lambda config, _, version: FakeEngine(config, version), workers)


def torch_launch(_: str) -> Launch:
    workers: list[LocalWorker] = []
    return local_launch(CONFIG, build_engine, workers)


def ray_launch(_: str) -> Launch:
    from treadle.actors.rollout import actor

    return actor.ray_launch(CONFIG)


SUBJECTS = [
    pytest.param(fake_launch, id="fake"),
    pytest.param(torch_launch, id="torch"),
    pytest.param(ray_launch, id="ray", marks=[pytest.mark.ray, pytest.mark.timeout(240)]),
]
Use = Callable[[RolloutPool], Awaitable[None]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=SUBJECTS)
def run(request: pytest.FixtureRequest, folder: str) -> Callable[[Use], None]:
    if request.param is ray_launch:
        request.getfixturevalue("ray_session")

    async def with_pool(use: Use) -> None:
        pool = RolloutPool(CONFIG, request.param(folder))
        await pool.start(folder)
        with closing(pool):
            await use(pool)

    return lambda use: asyncio.run(with_pool(use))


@contextmanager
def closing(pool: RolloutPool) -> Iterator[None]:
    try:
        yield
    finally:
        pool.close()


def issues() -> list[Issue]:
    return [issue(f"p{n}", prompt=f"{n}+1=", group_size=4, max_new_tokens=16) for n in range(5)]


async def contents(drawn: Drawn) -> tuple[Group, tuple[str, ...]]:
    group, texts = await opened(drawn.group), await texts_of(drawn.texts)
    assert isinstance(group, Group)
    return group, tuple(texts)


def test_a_draw_returns_sizes_and_references_that_agree(run: Callable[[Use], None]) -> None:
    async def use(pool: RolloutPool) -> None:
        assert isinstance(pool, Rollouts)
        one = issues()[0]
        drawn = await pool.draw(one)
        group, texts = await contents(drawn)
        assert (drawn.id, group.id, drawn.prompt.id) == (one.id, one.id, one.prompt.id)
        assert len(group.samples) == len(texts) == len(drawn.lengths) == len(drawn.stops) == 4
        assert drawn.lengths == tuple(s.drawn_tokens for s in group.samples)
        assert drawn.stops == tuple(s.stop for s in group.samples)
        assert drawn.oldest == min(s.oldest for s in group.samples)
        assert drawn.worker in pool.workers
        assert drawn.wall_s >= 0

    run(use)


def test_the_same_issue_gives_the_same_group_alone_and_in_company(run: Callable[[Use], None]) -> None:
    async def use(pool: RolloutPool) -> None:
        together = await asyncio.gather(*(pool.draw(one) for one in issues()))
        for drawn, one in zip(together, issues(), strict=True):
            alone, texts = await contents(await pool.draw(one))
            group, same_texts = await contents(drawn)
            assert texts == same_texts
            for ours, theirs in zip(group.samples, alone.samples, strict=True):
                np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
                np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)

    run(use)


def test_every_holder_answers_the_probe_with_the_same_values(run: Callable[[Use], None]) -> None:
    async def use(pool: RolloutPool) -> None:
        assert isinstance(pool, Scorer)
        found = await pool.logprobs([np.array([7, 8, 9], dtype=np.int32), np.array([5, 6], dtype=np.int32)])
        assert len(found) == CONFIG.workers
        values = list(found.values())
        assert values[0].shape == (3,)
        np.testing.assert_array_equal(values[0], values[1])

    run(use)


def test_what_cannot_be_drawn_is_a_typed_error(run: Callable[[Use], None]) -> None:
    async def use(pool: RolloutPool) -> None:
        with pytest.raises(DataError, match="prompt long"):
            await pool.draw(issue("long", prompt="1" * 90))
        pool._config = RolloutConfig(workers=2, draw_deadline_s=0.5)
        with pytest.raises(DeadlineError, match=r"rollout/draw: test/late .*version 3"):
            await pool.draw(issue("late", step=3))

    run(use)


def test_a_switch_to_another_model_starts_its_versions_anew(run: Callable[[Use], None], folder: str) -> None:
    async def use(pool: RolloutPool) -> None:
        await pool.load(folder, WeightVersion(step=7))
        drawn = await pool.draw(issue("a", step=7))
        assert (drawn.oldest.step, drawn.newest.step) == (7, 7)

    run(use)
