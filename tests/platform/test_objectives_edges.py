"""Group size 1, all equal, all failed, truncation, configuration and registry."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from treadle.platform.errors import ConfigError
from treadle.platform.objectives.base import Objective, ScoredGroup, TokenInputs
from treadle.platform.objectives.dapo import Dapo
from treadle.platform.objectives.denominators import constant_length, counted
from treadle.platform.objectives.dr_grpo import DrGrpo
from treadle.platform.objectives.group_stats import informative
from treadle.platform.objectives.grpo import Grpo
from treadle.platform.objectives.kl import KL_ESTIMATORS
from treadle.platform.objectives.policy_gradient import PolicyGradient
from treadle.platform.objectives.registry import OBJECTIVES
from treadle.platform.objectives.reinforce_pp import ReinforcePlusPlus
from treadle.platform.objectives.rloo import Rloo

GROUP_BASELINES = sorted(name for name, kind in OBJECTIVES.items() if kind().needs_groups)


def group(*rewards: float, lengths: list[int] | None = None, limit: int = 10) -> ScoredGroup:
    n = np.array(lengths or [4] * len(rewards))
    return ScoredGroup(rewards=np.array(rewards), lengths=n, truncated=n >= limit, max_new_tokens=limit)


def inputs(n: int = 4, **changes: torch.Tensor | None) -> TokenInputs:
    lp = torch.linspace(-3, -0.1, n)
    base = TokenInputs(
        logprobs=lp.clone().requires_grad_(),
        old_logprobs=lp,
        behaviour_logprobs=None,
        ref_logprobs=None,
        advantages=torch.ones(n),
        sequence=torch.zeros(n, dtype=torch.int64),
        n_sequences=1,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_keeps_the_interface_and_its_registered_name(name: str) -> None:
    objective = OBJECTIVES[name]()
    assert isinstance(objective, Objective)
    assert fields(objective)[0].name == "kind"  # type: ignore[arg-type]
    assert objective.kind == name  # type: ignore[attr-defined]
    objective.check()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_is_a_configuration_that_omegaconf_reads_and_returns(name: str) -> None:
    merged = OmegaConf.merge(OmegaConf.structured(OBJECTIVES[name]), {"kind": name})
    assert OmegaConf.to_object(merged) == OBJECTIVES[name]()


@pytest.mark.parametrize("name", GROUP_BASELINES)
def test_a_group_of_one_has_no_baseline_and_no_weight(name: str) -> None:
    alone, pair = OBJECTIVES[name]().credit([group(1.0), group(1.0, 0.0)])
    assert alone.weights.tolist() == [0.0]
    assert alone.advantages.tolist() == [0.0]
    assert (pair.weights > 0).all()


@pytest.mark.parametrize("name", GROUP_BASELINES)
@pytest.mark.parametrize("value", [0.0, 0.1, 1.1, -1 / 3])
def test_equal_rewards_give_advantages_of_exactly_zero(name: str, value: float) -> None:
    equal, _ = OBJECTIVES[name]().credit([group(*[value] * 7), group(1.0, 0.0)])
    assert equal.advantages.tolist() == [0.0] * 7
    assert (equal.weights > 0).all()


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_step_in_which_everything_failed_has_no_weight_at_all(name: str) -> None:
    for credit in OBJECTIVES[name]().credit([group(math.nan, math.nan), group(math.nan)]):
        assert not credit.weights.any()
        assert not credit.advantages.any()


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_step_without_groups_is_empty(name: str) -> None:
    assert OBJECTIVES[name]().credit([]) == []


@pytest.mark.parametrize("name", GROUP_BASELINES)
def test_a_failed_sample_changes_nothing_for_the_others(name: str) -> None:
    objective = OBJECTIVES[name]()
    (clean,) = objective.credit([group(1.0, 0.0, 0.25)])
    (dirty,) = objective.credit([group(1.0, math.nan, 0.0, 0.25)])
    assert dirty.weights[1] == 0
    np.testing.assert_array_equal(np.delete(dirty.advantages, 1), clean.advantages)
    np.testing.assert_array_equal(np.delete(dirty.weights, 1), clean.weights)


def test_a_failure_that_leaves_one_sample_takes_the_group_out() -> None:
    (credit,) = Grpo().credit([group(1.0, math.nan, math.nan)])
    assert not credit.weights.any()


def test_worked_examples_of_the_docstrings_hold() -> None:
    rewards = group(1.0, 0.0, 0.0, 1.0)
    assert Grpo().credit([rewards])[0].advantages == pytest.approx([0.866, -0.866, -0.866, 0.866], abs=1e-3)
    assert DrGrpo().credit([rewards])[0].advantages.tolist() == [0.5, -0.5, -0.5, 0.5]
    assert Rloo().credit([rewards])[0].advantages == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    lengths = [80, 90, 100]
    shaped = Dapo()._punishment(group(1, 1, 1, lengths=lengths, limit=100))
    assert shaped.tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_reinforce_pp_scales_by_the_batch_and_not_by_the_group() -> None:
    wide, narrow = ReinforcePlusPlus().credit([group(1.0, 0.0), group(0.1, 0.0)])
    assert wide.advantages[0] / narrow.advantages[0] == pytest.approx(10)


def test_long_answers_are_punished_before_they_are_cut_off() -> None:
    rewards = group(1.0, 1.0, lengths=[5, 10])
    (credit,) = Dapo().credit([rewards])
    assert credit.advantages[0] > 0 > credit.advantages[1]
    (plain,) = Dapo(overlong_factor=0).credit([rewards])
    assert not plain.advantages.any()


def test_the_overlong_filter_takes_truncated_samples_out_of_the_denominator_too() -> None:
    rewards = group(1.0, 0.0, 0.0, lengths=[4, 6, 10])
    (credit,) = Dapo(overlong_filter=True, overlong_factor=0).credit([rewards])
    assert credit.weights == pytest.approx([0.1, 0.1, 0.0])
    assert credit.advantages[0] > 0


def test_constant_normaliser_is_the_token_limit() -> None:
    groups = [group(1.0, 0.0, limit=50), group(1.0, math.nan, 0.0, limit=50)]
    assert constant_length(groups, counted(groups))[1] == pytest.approx([1 / 200, 0, 1 / 200])


@pytest.mark.parametrize("objective", [DrGrpo(), Dapo()])
def test_an_objective_that_needs_the_limit_says_so_when_it_is_missing(objective: Objective) -> None:
    unknown = ScoredGroup(rewards=np.ones(2), lengths=np.ones(2, int), truncated=np.zeros(2, bool))
    with pytest.raises(ValueError, match="max_new_tokens"):
        objective.credit([unknown])


def test_only_groups_with_differing_scores_are_informative() -> None:
    assert informative(np.array([1.0, 0.0]))
    assert informative(np.array([math.nan, 1.0, 0.0]))
    assert not informative(np.array([1.0, 1.0, math.nan]))
    assert not informative(np.array([math.nan, 1.0]))
    assert not informative(np.array([math.nan]))


def test_dynamic_sampling_is_dapos_alone_and_can_be_switched_off() -> None:
    assert [name for name in sorted(OBJECTIVES) if OBJECTIVES[name]().dynamic_sampling] == ["dapo"]
    assert not Dapo(drop_equal_groups=False).dynamic_sampling


def test_impossible_records_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[G\]"):
        ScoredGroup(rewards=np.ones(2), lengths=np.ones(3, int), truncated=np.zeros(2, bool))
    with pytest.raises(ValueError, match="infinity"):
        ScoredGroup(rewards=np.array([np.inf]), lengths=np.ones(1, int), truncated=np.zeros(1, bool))


@pytest.mark.parametrize(
    ("objective", "setting"),
    [
        (Grpo(kl_coefficient=-1), "objective.kl_coefficient"),
        (Grpo(eps_low=-0.1), "objective.eps_low"),
        (Grpo(eps_high=math.nan), "objective.eps_high"),
        (Grpo(kl_estimator="k4"), "objective.kl_estimator"),
        (Dapo(overlong_buffer=0), "objective.overlong_buffer"),
        (Rloo(tis_cap=-2), "objective.tis_cap"),
    ],
)
def test_impossible_settings_are_named(objective: PolicyGradient, setting: str) -> None:
    with pytest.raises(ConfigError, match=setting):
        objective.check()


def test_a_kl_term_without_a_reference_is_refused_and_not_left_out() -> None:
    with pytest.raises(ConfigError, match="kl_coefficient"):
        Grpo().token_losses(inputs())


def test_kl_estimators_have_their_known_values_and_k3_is_never_negative() -> None:
    new, ref = torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -1.0])
    assert KL_ESTIMATORS["k1"](new, ref).tolist() == pytest.approx([0.5, 0])
    assert KL_ESTIMATORS["k2"](new, ref).tolist() == pytest.approx([0.125, 0])
    assert KL_ESTIMATORS["k3"](new, ref).tolist() == pytest.approx([math.exp(-0.5) - 1 + 0.5, 0])
    tiny = torch.linspace(-1e-4, 1e-4, 101)
    assert (KL_ESTIMATORS["k3"](tiny, torch.zeros(101)) >= 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_kl_has_the_gradient_of_the_kl(estimator: str) -> None:
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.0, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
    policy = theta.log_softmax(0)
    old = policy.detach()
    objective = Grpo(kl_coefficient=1.0, kl_estimator=estimator, kl_unbiased=True)
    losses = objective.token_losses(
        replace(
            inputs(3), logprobs=policy, old_logprobs=old, ref_logprobs=ref, advantages=torch.zeros(3).double()
        )
    ).losses
    (sampled,) = torch.autograd.grad((old.exp() * losses).sum(), theta, retain_graph=True)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), theta)
    torch.testing.assert_close(sampled, exact)


def test_truncated_weights_are_capped_and_carry_no_gradient() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    behaviour = old - torch.tensor([0.0, 0.5, 5.0, -1.0])
    given = inputs(4, old_logprobs=old, behaviour_logprobs=behaviour)
    given = replace(given, logprobs=old.clone().requires_grad_())
    result = Grpo(kl_coefficient=0).token_losses(given)
    expected = [1.0, math.exp(0.5), 2.0, math.exp(-1)]
    assert result.metrics["is_weight"].tolist() == pytest.approx(expected)
    result.losses.sum().backward()
    assert given.logprobs.grad is not None
    assert given.logprobs.grad.tolist() == pytest.approx([-w for w in expected])


def test_metrics_are_detached_and_absent_without_their_inputs() -> None:
    bare = Grpo(kl_coefficient=0).token_losses(inputs())
    assert sorted(bare.metrics) == ["clip_fraction", "ratio"]
    off = Grpo(tis_cap=0, kl_coefficient=0).token_losses(
        inputs(behaviour_logprobs=torch.zeros(4), ref_logprobs=torch.zeros(4))
    )
    assert sorted(off.metrics) == ["clip_fraction", "kl", "ratio"]
    assert not any(value.requires_grad for value in off.metrics.values())


def test_an_empty_micro_batch_has_no_losses() -> None:
    for name in sorted(OBJECTIVES):
        objective = OBJECTIVES[name]()
        empty = replace(inputs(0, ref_logprobs=torch.zeros(0)), n_sequences=0)
        assert objective.token_losses(empty).losses.shape == (0,)
