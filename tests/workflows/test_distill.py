"""The teacher's answers: only verified ones, each once, and the same after a round trip."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from tests.workflows.plain_roles import CoinRollouts, DigitVerifiers, NumberedPrompts
from tests.workflows.plain_stage import PlainBroadcast, PlainLearner

from treadle.platform.errors import DataError
from treadle.platform.records import Drawn, Sampling, Verdict, VerdictStatus, WeightVersion
from treadle.workflows.distill import VerifiedSet, verified_answers
from treadle.workflows.roles import Roles

VERSION = WeightVersion(step=0)


@dataclass
class EvenSamplesFail:
    """A verifier that breaks on every second sample and finds the others right."""

    seen: list[str] = field(default_factory=list)

    async def judge(self, drawn: Drawn) -> tuple[Verdict, ...]:
        self.seen.append(drawn.id)
        return tuple(
            Verdict(
                status=VerdictStatus.SCORED if i % 2 else VerdictStatus.FAILED,
                reward=1.0 if i % 2 else float("nan"),
                parts=(("accuracy", 1.0),) if i % 2 else (),
                wall_s=0.0,
                detail="",
                verifier="t/1",
            )
            for i in range(len(drawn.lengths))
        )


def answers(
    *,
    skill: float = 0.5,
    verifiers: DigitVerifiers | EvenSamplesFail | None = None,
    count: int = 20,
    samples: int = 4,
    keep: int = 1,
) -> VerifiedSet:
    roles = Roles(
        rollouts=CoinRollouts(skill=lambda step: skill),  # type: ignore[arg-type]  it never changes its model here
        verifiers=verifiers or DigitVerifiers(),
        learner=PlainLearner(),
        broadcast=PlainBroadcast(),
        ranks=1,
    )
    return asyncio.run(
        verified_answers(
            roles,
            NumberedPrompts(),
            count=count,
            sampling=Sampling(temperature=1.0, top_p=1.0, max_new_tokens=1, group_size=samples, seed=5),
            label="student/teacher",
            version=VERSION,
            keep_per_prompt=keep,
        )
    )


def test_only_right_answers_are_kept() -> None:
    kept = answers(skill=0.5)
    assert 0 < len(kept) <= 20
    assert kept.asked == 80
    for row in kept.rows():
        assert row.token_ids[1] == row.token_ids[0]  # the right digit repeats the prompt's


def test_the_same_answer_is_kept_once_however_many_are_asked_for() -> None:
    assert len(answers(skill=1.0, keep=4)) == 20  # there is one right answer to each prompt


def test_an_answer_whose_verifier_broke_is_not_kept_though_it_may_be_right() -> None:
    assert len(answers(skill=1.0, samples=2, verifiers=EvenSamplesFail(), count=3)) == 3
    with pytest.raises(DataError, match="not one of 3 prompts"):
        answers(skill=1.0, samples=1, verifiers=EvenSamplesFail(), count=3)


def test_the_completion_is_the_target_and_the_prompt_is_not() -> None:
    for row in answers(skill=1.0).rows():
        assert row.loss_mask.tolist() == [False, True]


def test_a_teacher_that_is_never_right_is_an_error_that_names_the_stage() -> None:
    with pytest.raises(DataError, match="student/teacher: not one of 20 prompts"):
        answers(skill=0.0)


def test_a_saved_set_is_the_same_when_loaded(tmp_path: Path) -> None:
    made = answers(skill=0.7, samples=8)
    made.save(tmp_path / "answers.npz")
    loaded = VerifiedSet.load(tmp_path / "answers.npz")
    assert loaded.asked == made.asked
    for mine, theirs in zip(made.rows(), loaded.rows(), strict=True):
        assert np.array_equal(mine.token_ids, theirs.token_ids)
        assert np.array_equal(mine.loss_mask, theirs.loss_mask)
    assert [file.name for file in tmp_path.iterdir()] == ["answers.npz"]
