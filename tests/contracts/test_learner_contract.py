"""`contracts.Learner` and `contracts.Scorer`, kept by the Ray group over every backend."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from tests.actors.learner.ranks import deal, drawn_samples, tiny_model

from treadle.actors.learner.config import LearnerConfig
from treadle.actors.learner.group import LearnerGroup
from treadle.actors.learner.stepping import LearnerSpec
from treadle.platform.contracts import Learner, Scorer
from treadle.platform.errors import CheckpointError, LearnerError
from treadle.platform.objectives.grpo import Grpo

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]
T = TypeVar("T")
CONFIG = LearnerConfig(backend="torch", zero=0, ranks=2, lr=1e-2, start_deadline_s=280.0)
BACKENDS = {
    "torch": CONFIG,
    "zero1": replace(CONFIG, backend="deepspeed", zero=1),
    "zero3": replace(CONFIG, backend="deepspeed", zero=3),
}


def wait(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("m") / "tiny")


@pytest.fixture(scope="module")
def group(ray_session: None) -> Iterator[LearnerGroup]:
    learner = LearnerGroup(CONFIG)
    wait(learner.start())
    yield learner
    learner.close()


@pytest.fixture(params=BACKENDS)
def learner(request: pytest.FixtureRequest, group: LearnerGroup, folder: str) -> LearnerGroup:
    wait(group.setup(LearnerSpec(model_folder=folder, config=BACKENDS[request.param], objective=Grpo())))
    return group


def probe(learner: LearnerGroup) -> np.ndarray:
    (values,) = wait(learner.logprobs([np.arange(3, 12, dtype=np.int32)])).values()
    return values


def test_it_is_a_learner_and_a_scorer(learner: LearnerGroup) -> None:
    assert isinstance(learner, Learner)
    assert isinstance(learner, Scorer)


def test_a_step_makes_the_next_version_and_moves_the_policy(learner: LearnerGroup) -> None:
    before = probe(learner)
    report = wait(learner.step(deal(drawn_samples(6), 2, step=0)))
    assert report.version.step == 1
    assert report.skipped == ""
    assert report.tokens == sum(int(s.loss_mask.sum()) for s in drawn_samples(6))
    assert np.abs(probe(learner) - before).max() > 1e-4
    for name in ("policy/loss", "policy/entropy", "policy/grad_norm", "policy/lr", "perf/tokens_per_s"):
        assert np.isfinite(report.metrics[name])


def test_log_probabilities_are_one_less_than_tokens_per_sequence(learner: LearnerGroup) -> None:
    sequences = [np.arange(1, n, dtype=np.int32) for n in (9, 4, 17)]
    (together,) = wait(learner.logprobs(sequences)).values()
    assert len(together) == 7 + 2 + 15
    alone = np.concatenate([v for s in sequences for v in wait(learner.logprobs([s])).values()])
    assert np.allclose(together, alone, atol=1e-6)
    assert (together < 0).all()


def test_what_was_saved_is_what_is_loaded(learner: LearnerGroup, tmp_path: Path) -> None:
    wait(learner.step(deal(drawn_samples(6), 2, step=0)))
    wait(learner.save(str(tmp_path / "c"), {"cursor": 3}))
    saved = probe(learner)
    expected = wait(learner.step(deal(drawn_samples(6, seed=1), 2, step=1)))
    after = probe(learner)
    wait(learner.load(str(tmp_path / "c")))
    assert np.array_equal(probe(learner), saved)
    again = wait(learner.step(deal(drawn_samples(6, seed=1), 2, step=1)))
    assert again.metrics["policy/loss"] == expected.metrics["policy/loss"]
    assert np.array_equal(probe(learner), after)


def test_a_step_with_a_loss_that_is_not_finite_says_so_and_changes_nothing(learner: LearnerGroup) -> None:
    before = probe(learner)
    samples = drawn_samples(4)
    bad = replace(samples[1], weights=np.full_like(samples[1].weights, np.inf))
    report = wait(learner.step(deal([samples[0], bad, *samples[2:]], 2)))
    assert "non-finite" in report.skipped
    assert np.array_equal(probe(learner), before)


def test_a_checkpoint_that_is_not_there_is_named(group: LearnerGroup, folder: str, tmp_path: Path) -> None:
    wait(group.setup(LearnerSpec(model_folder=folder, config=CONFIG, objective=Grpo())))
    with pytest.raises(CheckpointError, match="none-here"):
        wait(group.load(str(tmp_path / "none-here")))


def test_a_group_that_was_not_started_says_so() -> None:
    with pytest.raises(LearnerError, match="Call start first"):
        wait(LearnerGroup(CONFIG).save("x", {}))
