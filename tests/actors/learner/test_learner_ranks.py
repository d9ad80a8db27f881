"""Backends against each other over real process groups: the same step on the same batch, whatever carries it out.

A gradient is read off Adam's first moment after the first update: exp_avg = (1 - beta1) * gradient.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.actors.learner.ranks import Full, Ranks, deal, drawn_samples, largest_difference

from treadle.actors.learner.config import LearnerConfig
from treadle.actors.learner.stepping import LearnerSpec
from treadle.platform.objectives.grpo import Grpo
from treadle.platform.records import StepBatch, StepReport, TrainSample

pytestmark = pytest.mark.deepspeed

TORCH = LearnerConfig(
    backend="torch",
    zero=0,
    ranks=2,
    lr=1e-3,
    betas=(0.9, 0.95),
    grad_clip=0.0,
    max_tokens_per_microbatch=10_000,
)
GRPO = Grpo()


def spec(folder: str, config: LearnerConfig = TORCH, objective: Grpo = GRPO) -> LearnerSpec:
    return LearnerSpec(model_folder=folder, config=config, objective=objective)


def trained(
    ranks: Ranks, plan: LearnerSpec, steps: int = 1, first: int = 0, batch_seed: int = 0
) -> tuple[list[StepReport], Full]:
    """Sets up and makes `steps` steps on batches of 10 samples."""
    ranks.call("setup", plan)
    return continued(ranks, steps, first, batch_seed)


def continued(ranks: Ranks, steps: int, first: int, batch_seed: int = 0) -> tuple[list[StepReport], Full]:
    reports = [
        ranks.step(deal(drawn_samples(10, seed=batch_seed + s), ranks.n, step=s))
        for s in range(first, first + steps)
    ]
    return reports, ranks.full()


def zero(stage: int, **changes: object) -> LearnerConfig:
    return replace(TORCH, backend="deepspeed", zero=stage, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def one_rank_truth(one_rank: Ranks, model_folder: str) -> tuple[list[StepReport], Full]:
    """One rank, one micro-batch, padded: the plainest way to make the step."""
    return trained(one_rank, spec(model_folder, replace(TORCH, packing="padded")))


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 25, 60, 10_000])
@pytest.mark.parametrize("n", [1, 2])
def test_ranks_packing_and_accumulation_leave_loss_and_gradient_unchanged(
    packing: str,
    budget: int,
    n: int,
    one_rank: Ranks,
    two_ranks: Ranks,
    model_folder: str,
    one_rank_truth: tuple[list[StepReport], Full],
) -> None:
    config = replace(TORCH, packing=packing, max_tokens_per_microbatch=budget)
    reports, full = trained(one_rank if n == 1 else two_ranks, spec(model_folder, config))
    truth_reports, truth = one_rank_truth
    for name in ("policy/loss", "policy/grad_norm", "policy/entropy", "mismatch/kl", "mismatch/max"):
        assert reports[0].metrics[name] == pytest.approx(truth_reports[0].metrics[name], rel=2e-6, abs=1e-6)
    assert largest_difference(full.exp_avg, truth.exp_avg) < 1e-7  # a tenth of the gradient's difference
    microbatches = reports[0].metrics["perf/microbatches"]
    assert microbatches == {1: 10, 10_000: n}.get(budget, microbatches)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("budget", [30, 10_000])
def test_zero_makes_the_same_steps_as_plain_torch(
    stage: int, budget: int, two_ranks: Ranks, model_folder: str
) -> None:
    changes = {"grad_clip": 0.05, "weight_decay": 0.1, "max_tokens_per_microbatch": budget, "eps": 1e-5}
    oracle_reports, oracle = trained(two_ranks, spec(model_folder, replace(TORCH, **changes)), steps=4)
    reports, full = trained(two_ranks, spec(model_folder, zero(stage, **changes)), steps=4)
    for ours, theirs in zip(reports, oracle_reports, strict=True):
        assert ours.metrics["policy/loss"] == pytest.approx(theirs.metrics["policy/loss"], abs=1e-6)
        assert ours.metrics["policy/grad_norm"] == pytest.approx(theirs.metrics["policy/grad_norm"], rel=1e-5)
        assert theirs.metrics["policy/grad_norm"] > 0.05  # otherwise clipping would not be tested
    assert largest_difference(full.masters, oracle.masters) < 1e-6
    assert largest_difference(full.exp_avg, oracle.exp_avg) < 1e-6
    assert full.updates == oracle.updates == 4


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_in_bf16_keeps_fp32_masters_like_plain_torch(
    stage: int, two_ranks: Ranks, model_folder: str
) -> None:
    changes = {"dtype": "bf16", "max_tokens_per_microbatch": 40, "eps": 1e-5}
    _, oracle = trained(two_ranks, spec(model_folder, replace(TORCH, **changes)), steps=3)
    _, full = trained(two_ranks, spec(model_folder, zero(stage, **changes)), steps=3)
    moved = TORCH.lr * 3
    assert largest_difference(full.masters, oracle.masters) < 0.3 * moved
    assert any(not np.array_equal(full.masters[n], full.weights[n]) for n in full.masters)
    for name, weight in full.weights.items():  # the model computes with the rounded masters
        assert np.abs(weight - full.masters[name]).max() <= 2**-8 * np.abs(weight).max() + 1e-30


@pytest.mark.parametrize("config", [TORCH, zero(1), zero(2), zero(3)], ids=["torch", "z1", "z2", "z3"])
def test_ranks_with_unequal_work_agree(config: LearnerConfig, two_ranks: Ranks, model_folder: str) -> None:
    """One rank has all samples in five micro-batches, the other none at all."""
    samples = drawn_samples(6, seed=3)
    results = []
    for rows in (((*samples,), ()), (tuple(samples[:3]), tuple(samples[3:]))):
        plan = spec(model_folder, replace(config, max_tokens_per_microbatch=30))
        two_ranks.call("setup", plan)
        report = two_ranks.step(StepBatch(step=0, rows=rows))
        results.append((report, two_ranks.full()))
    (lopsided, ours), (even, theirs) = results
    assert lopsided.metrics["policy/loss"] == pytest.approx(even.metrics["policy/loss"], abs=1e-6)
    assert lopsided.metrics["policy/entropy"] == pytest.approx(even.metrics["policy/entropy"], abs=1e-6)
    assert largest_difference(ours.exp_avg, theirs.exp_avg) < 1e-7


@pytest.mark.parametrize(
    "config",
    [TORCH, zero(0), zero(1), zero(1, dtype="bf16"), zero(2), zero(3)],
    ids=["torch", "z0", "z1", "z1-bf16", "z2", "z3"],
)
def test_a_loss_that_is_not_finite_on_one_rank_changes_no_weight_on_any(
    config: LearnerConfig, two_ranks: Ranks, model_folder: str
) -> None:
    two_ranks.call("setup", spec(model_folder, config))
    continued(two_ranks, 1, 0)
    before = two_ranks.full()
    good = drawn_samples(6, seed=5)
    bad = replace(good[1], advantages=np.full_like(good[1].advantages, np.nan))
    report = two_ranks.step(StepBatch(step=1, rows=((good[0],), (bad,))))
    assert report.skipped == "non-finite loss (rank 1)"
    assert not np.isfinite(report.metrics["policy/grad_norm"])
    assert two_ranks.full().equals(before)
    after, full = continued(two_ranks, 1, 2)
    assert after[0].skipped == ""
    assert full.updates == before.updates + 1
    assert all(np.isfinite(values).all() for values in full.weights.values())


@pytest.mark.parametrize(
    "config",
    [TORCH, replace(TORCH, dtype="bf16"), zero(1), zero(1, dtype="bf16"), zero(2), zero(3), zero(0)],
    ids=["torch", "torch-bf16", "z1", "z1-bf16", "z2", "z3", "z0"],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    config: LearnerConfig, two_ranks: Ranks, model_folder: str, tmp_path: Path
) -> None:
    plan = spec(model_folder, replace(config, grad_clip=0.5, max_tokens_per_microbatch=60))
    trained(two_ranks, plan, steps=2)
    two_ranks.call("save", str(tmp_path), {"note": 1})
    _, uninterrupted = continued(two_ranks, 2, 2)
    two_ranks.call("setup", plan)
    assert two_ranks.call("load", str(tmp_path)) == [{"note": 1}] * 2
    _, resumed = continued(two_ranks, 2, 2)
    assert resumed.equals(uninterrupted)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [(zero(3), TORCH), (TORCH, zero(3)), (zero(2), zero(3)), (zero(1), zero(2)), (zero(0), zero(1))],
    ids=["z3-torch", "torch-z3", "z2-z3", "z1-z2", "z0-z1"],
)
def test_a_checkpoint_loads_exactly_into_any_backend_and_world_size(
    writer: LearnerConfig,
    reader: LearnerConfig,
    one_rank: Ranks,
    two_ranks: Ranks,
    model_folder: str,
    tmp_path: Path,
) -> None:
    _, written = trained(two_ranks, spec(model_folder, writer), steps=2)
    two_ranks.call("save", str(tmp_path / "two"), {})
    for ranks in (two_ranks, one_rank):
        ranks.call("setup", spec(model_folder, replace(reader, ranks=ranks.n)))
        ranks.call("load", str(tmp_path / "two"))
        assert ranks.full().equals(written)
    # and back: written by one rank, read by two
    one_rank.call("save", str(tmp_path / "one"), {})
    two_ranks.call("setup", spec(model_folder, writer))
    two_ranks.call("load", str(tmp_path / "one"))
    assert two_ranks.full().equals(written)


@pytest.mark.parametrize("config", [TORCH, zero(3)], ids=["torch", "z3"])
def test_activation_checkpointing_changes_nothing(
    config: LearnerConfig, two_ranks: Ranks, model_folder: str
) -> None:
    _, plain = trained(two_ranks, spec(model_folder, config))
    _, checkpointed = trained(two_ranks, spec(model_folder, replace(config, activation_checkpointing=True)))
    assert largest_difference(plain.exp_avg, checkpointed.exp_avg) < 1e-7


def test_the_reference_policy_is_renewed_and_survives_a_checkpoint(
    two_ranks: Ranks, model_folder: str, tmp_path: Path
) -> None:
    plan = spec(model_folder, zero(3, replace_reference_every=2, lr=1e-2), Grpo(kl_coefficient=0.1))
    reports, _ = trained(two_ranks, plan, steps=3)
    kl = [report.metrics["policy/kl"] for report in reports]
    assert kl[0] == pytest.approx(0.0, abs=1e-7)  # the reference is the start
    assert kl[1] > 1e-4
    assert kl[2] == pytest.approx(0.0, abs=1e-7)  # renewed after step 2
    two_ranks.call("save", str(tmp_path), {})
    more, uninterrupted = continued(two_ranks, 1, 3)
    assert more[0].metrics["policy/kl"] > 1e-4
    two_ranks.call("setup", plan)
    two_ranks.call("load", str(tmp_path))
    again, resumed = continued(two_ranks, 1, 3)
    assert again[0].metrics["policy/kl"] == more[0].metrics["policy/kl"]
    assert resumed.equals(uninterrupted)


def test_the_probe_gives_every_rank_the_same_answer(two_ranks: Ranks, model_folder: str) -> None:
    sequences = [np.asarray(s.token_ids) for s in drawn_samples(5, seed=9)]
    answers = []
    for config in (TORCH, zero(2), zero(3)):
        two_ranks.call("setup", spec(model_folder, config))
        ours, theirs = two_ranks.call("logprobs", sequences)
        assert np.array_equal(ours, theirs)
        assert len(ours) == sum(len(tokens) - 1 for tokens in sequences)
        answers.append(ours)
    assert np.abs(answers[0] - answers[1]).max() < 1e-6
    assert np.abs(answers[0] - answers[2]).max() < 1e-6


def supervised(samples: list[TrainSample]) -> list[TrainSample]:
    return [replace(sample, behaviour_logprobs=None) for sample in samples]


def test_supervised_samples_have_no_mismatch(two_ranks: Ranks, model_folder: str) -> None:
    two_ranks.call("setup", spec(model_folder))
    report = two_ranks.step(deal(supervised(drawn_samples(4)), 2))
    assert "mismatch/kl" not in report.metrics
