"""Evaluation: the estimators against enumeration, and what a failed verifier does to a mean."""

from __future__ import annotations

import asyncio
import itertools
import math

import pytest
from tests.workflows.plain_roles import CoinRollouts, DigitVerifiers, NumberedPrompts

from treadle.platform.errors import ConfigError, VerifierError
from treadle.platform.records import Verdict, VerdictStatus, WeightVersion
from treadle.workflows.evaluate import EvalReport, EvaluateConfig, correctness, evaluate, pass_at_k


def evaluated(
    config: EvaluateConfig, *, skill: float = 0.5, verifiers: DigitVerifiers | None = None, n: int = 1000
) -> EvalReport:
    rollouts = CoinRollouts(skill=lambda step: skill)
    return asyncio.run(
        evaluate(
            rollouts,
            verifiers or DigitVerifiers(),
            NumberedPrompts(n),
            config,
            label="t/eval",
            seed=11,
            version=WeightVersion(step=0),
        )
    )


def verdict(reward: float, *parts: tuple[str, float]) -> Verdict:
    return Verdict(
        status=VerdictStatus.SCORED, reward=reward, parts=parts, wall_s=0.0, detail="", verifier="t/1"
    )


def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_correct_sample() -> None:
    for n in range(1, 8):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < correct for i in range(n)], k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_one_is_the_mean_whatever_the_number_of_samples() -> None:
    report = evaluated(EvaluateConfig(prompts=40, samples=8))
    assert dict(report.pass_at_k)[1] == pytest.approx(report.sampled)
    assert [k for k, _ in report.pass_at_k] == [1, 2, 4, 8]
    values = [value for _, value in report.pass_at_k]
    assert values == sorted(values)


def test_the_interval_is_that_of_a_mean_of_independent_prompts() -> None:
    report = evaluated(EvaluateConfig(prompts=100, samples=1, greedy=False))
    p, n = report.sampled, report.n
    assert report.ci95 == pytest.approx(1.96 * math.sqrt(p * (1 - p) / (n - 1)))
    assert n == 100
    assert report.greedy is None


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(60):
        report = asyncio.run(
            evaluate(
                CoinRollouts(skill=lambda step: 0.6),
                DigitVerifiers(),
                NumberedPrompts(),
                EvaluateConfig(prompts=64, samples=2, greedy=False),
                label="t/eval",
                seed=seed,
                version=WeightVersion(step=0),
            )
        )
        covered += abs(report.sampled - 0.6) <= report.ci95
    assert 50 <= covered <= 60  # 57 expected of a 95 % interval


def test_a_group_the_verifier_fails_on_is_left_out_and_counted() -> None:
    whole = evaluated(EvaluateConfig(prompts=20, samples=2, greedy=False), skill=1.0)
    broken = DigitVerifiers(broken=lambda group: int(group.rsplit("/", 1)[1]) % 4 == 0)
    partial = evaluated(EvaluateConfig(prompts=20, samples=2, greedy=True), skill=1.0, verifiers=broken)
    assert (whole.sampled, whole.unscored, whole.n) == (1.0, 0, 20)
    assert (partial.sampled, partial.greedy, partial.unscored, partial.n) == (1.0, 1.0, 10, 15)
    assert "unscored 10" in partial.line()


def test_an_evaluation_without_a_single_verdict_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(VerifierError, match="none of 5 prompts got a verdict"):
        evaluated(EvaluateConfig(prompts=5), verifiers=DigitVerifiers(broken=lambda group: True))


def test_at_most_the_whole_split_is_asked_and_each_prompt_once() -> None:
    report = evaluated(EvaluateConfig(prompts=500), n=30)
    assert report.n == 30


def test_the_same_seed_gives_the_same_figures() -> None:
    config = EvaluateConfig(prompts=50, samples=4)
    assert evaluated(config) == evaluated(config)


def test_accuracy_counts_the_accuracy_part_and_not_the_whole_reward() -> None:
    formatted_but_wrong = verdict(1.0, ("accuracy", 0.0), ("format", 1.0))
    right_without_format = verdict(1.0, ("accuracy", 1.0), ("format", 0.0))
    without_parts = verdict(1.0)
    assert correctness([formatted_but_wrong, right_without_format, without_parts]) == [False, True, True]


def test_a_report_survives_json() -> None:
    report = evaluated(EvaluateConfig(prompts=10, samples=4))
    stored = report.as_json()
    powers = stored["pass_at_k"]
    assert isinstance(powers, dict)
    again = EvalReport(**{**stored, "pass_at_k": tuple((int(k), v) for k, v in powers.items())})  # type: ignore[arg-type]
    assert again == report


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (EvaluateConfig(prompts=0), "stages.x.evaluate: prompts=0"),
        (EvaluateConfig(samples=0), "samples=0"),
        (EvaluateConfig(temperature=0.0), "stages.x.evaluate.temperature=0.0"),
    ],
)
def test_settings_that_cannot_evaluate_are_refused_by_name(config: EvaluateConfig, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config.check("stages.x.evaluate")
