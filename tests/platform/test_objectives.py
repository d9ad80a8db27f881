"""Every objective against loops written from the papers, on random steps: lengths, failures,
micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.platform import plain_objectives as plain

from treadle.platform.objectives.base import Objective, ScoredGroup, TokenInputs
from treadle.platform.objectives.cispo import Cispo
from treadle.platform.objectives.cross_entropy import CrossEntropy
from treadle.platform.objectives.dapo import Dapo
from treadle.platform.objectives.dr_grpo import DrGrpo
from treadle.platform.objectives.grpo import Grpo
from treadle.platform.objectives.gspo import Gspo
from treadle.platform.objectives.reinforce_pp import ReinforcePlusPlus
from treadle.platform.objectives.rloo import Rloo

LIMIT = 7
PAIRS: dict[str, tuple[Objective, Callable[[plain.Case], torch.Tensor]]] = {
    "grpo": (Grpo(), lambda c: plain.grpo(c, 0.2, 0.2, 2.0, 0.04, "k3")),
    "grpo_r1": (
        Grpo(kl_coefficient=0.5, kl_estimator="k1", eps_low=0.9, eps_high=10, tis_cap=0),
        lambda c: plain.grpo(c, 0.9, 10, 0, 0.5, "k1"),
    ),
    "dr_grpo": (DrGrpo(), lambda c: plain.dr_grpo(c, 0.2, 0.2, 2.0, LIMIT)),
    "dapo": (Dapo(), lambda c: plain.dapo(c, 0.2, 0.28, 2.0, LIMIT, 0.2, 1.0, False)),
    "dapo_filter": (
        Dapo(overlong_filter=True, overlong_buffer=0.6, overlong_factor=0.5, tis_cap=0),
        lambda c: plain.dapo(c, 0.2, 0.28, 0, LIMIT, 0.6, 0.5, True),
    ),
    "gspo": (Gspo(), lambda c: plain.gspo(c, 3e-4, 4e-4, 2.0)),
    "gspo_wide": (Gspo(eps_low=0.3, eps_high=0.4), lambda c: plain.gspo(c, 0.3, 0.4, 2.0)),
    "cispo": (Cispo(), lambda c: plain.cispo(c, 5.0, 2.0)),
    "cispo_tight": (Cispo(weight_cap=1.1, tis_cap=1.0), lambda c: plain.cispo(c, 1.1, 1.0)),
    "rloo": (Rloo(), lambda c: plain.rloo(c, 0.2, 0.2, 2.0)),
    "rloo_wide": (Rloo(eps_low=0.8, eps_high=3.0, tis_cap=0), lambda c: plain.rloo(c, 0.8, 3.0, 0)),
    "reinforce_pp": (
        ReinforcePlusPlus(kl_coefficient=0.1),
        lambda c: plain.reinforce_pp(c, 0.2, 0.2, 2.0, 0.1, "k2"),
    ),
    "cross_entropy": (CrossEntropy(), plain.cross_entropy),
}


@dataclass
class Step:
    """A step's facts: rewards and lengths per prompt, a seed for the log-probabilities, into how many
    micro-batches it is cut, and how far (in nats) the policy has moved since the step began."""

    rewards: list[list[float]]
    lengths: list[list[int]]
    seed: int
    pieces: int
    moved: float = 0.3


reward = st.one_of(
    st.sampled_from([0.0, 1.0, 1.1]), st.just(math.nan), st.floats(-2, 2).map(lambda x: round(x, 3))
)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    rewards = draw(st.lists(st.lists(reward, min_size=1, max_size=5), min_size=1, max_size=4))
    lengths = [draw(st.lists(st.integers(1, LIMIT), min_size=len(r), max_size=len(r))) for r in rewards]
    moved = draw(st.sampled_from([0.0, 5e-4, 0.3]))
    return Step(rewards, lengths, draw(st.integers(0, 2**31)), draw(st.integers(1, 4)), moved)


@dataclass
class Tokens:
    """The four log-probabilities of every token of a step, flat, and which sample it belongs to."""

    new: torch.Tensor
    old: torch.Tensor
    behaviour: torch.Tensor
    ref: torch.Tensor


def tokens_of(step: Step) -> Tokens:
    rng = np.random.default_rng(step.seed)
    n = sum(map(sum, step.lengths))
    old = rng.uniform(-4, -0.05, n)
    arrays = [
        old + rng.normal(0, step.moved, n),
        old,
        old + rng.normal(0, 0.5, n),
        old + rng.normal(0, 0.3, n),
    ]
    new, old_t, behaviour, ref = (torch.tensor(a, dtype=torch.float64) for a in arrays)
    return Tokens(new.requires_grad_(), old_t, behaviour, ref)


def scored_groups(step: Step) -> list[ScoredGroup]:
    return [
        ScoredGroup(
            rewards=np.array(r), lengths=np.array(n), truncated=np.array(n) >= LIMIT, max_new_tokens=LIMIT
        )
        for r, n in zip(step.rewards, step.lengths, strict=True)
    ]


def packed_loss(objective: Objective, step: Step, tokens: Tokens) -> torch.Tensor:
    """What the learner does: sum of weighted token losses over micro-batches of whole sequences."""
    credit = objective.credit(scored_groups(step))
    advantages = [a for c in credit for a in c.advantages]
    weights = [w for c in credit for w in c.weights]
    lengths = [n for group in step.lengths for n in group]
    ends = np.cumsum(lengths)
    total = torch.zeros((), dtype=torch.float64)
    for piece in np.array_split(np.arange(len(lengths)), step.pieces):
        if len(piece):
            span = slice(int(ends[piece[0]]) - lengths[piece[0]], int(ends[piece[-1]]))
            counts = torch.tensor([lengths[i] for i in piece])
            total = total + piece_loss(
                objective, tokens, span, counts, [advantages[i] for i in piece], [weights[i] for i in piece]
            )
    return total


def piece_loss(
    objective: Objective,
    tokens: Tokens,
    span: slice,
    counts: torch.Tensor,
    advantages: Sequence[float],
    weights: Sequence[float],
) -> torch.Tensor:
    inputs = TokenInputs(
        logprobs=tokens.new[span],
        old_logprobs=tokens.old[span],
        behaviour_logprobs=tokens.behaviour[span],
        ref_logprobs=tokens.ref[span] if objective.needs_reference else None,
        advantages=torch.tensor(advantages, dtype=torch.float64).repeat_interleave(counts),
        sequence=torch.arange(len(counts)).repeat_interleave(counts),
        n_sequences=len(counts),
    )
    losses = objective.token_losses(inputs).losses
    return (torch.tensor(weights, dtype=torch.float64).repeat_interleave(counts) * losses).sum()


def plain_case(step: Step, tokens: Tokens) -> plain.Case:
    case: plain.Case = []
    start = 0
    for rewards, lengths in zip(step.rewards, step.lengths, strict=True):
        group = []
        for r, n in zip(rewards, lengths, strict=True):
            span = range(start, start + n)
            group.append(
                plain.PlainSample(
                    reward=r,
                    truncated=n >= LIMIT,
                    new=[tokens.new[i] for i in span],
                    old=[tokens.old[i].item() for i in span],
                    behaviour=[tokens.behaviour[i].item() for i in span],
                    ref=[tokens.ref[i].item() for i in span],
                )
            )
            start += n
        case.append(group)
    return case


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    if not loss.requires_grad:
        return torch.zeros_like(of)
    (found,) = torch.autograd.grad(loss, of)
    return found


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=25, deadline=None)
@given(step=steps())
def test_loss_and_gradient_equal_the_plain_formula(name: str, step: Step) -> None:
    objective, formula = PAIRS[name]
    tokens = tokens_of(step)
    ours = packed_loss(objective, step, tokens)
    theirs = formula(plain_case(step, tokens))
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    torch.testing.assert_close(gradient(ours, tokens.new), gradient(theirs, tokens.new), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_the_comparison_is_not_about_zeros(name: str) -> None:
    step = Step([[1.0, 0.0, math.nan, 0.25], [0.0, 1.0, 1.0]], [[3, 7, 2, 1], [4, 4, 6]], seed=3, pieces=2)
    step.moved = 5e-4 if name == "gspo" else 0.3
    tokens = tokens_of(step)
    loss = packed_loss(PAIRS[name][0], step, tokens)
    assert abs(loss.item()) > 1e-4
    assert gradient(loss, tokens.new).abs().max() > 1e-4


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=8, deadline=None)
@given(step=steps())
def test_cutting_the_step_into_micro_batches_changes_nothing(name: str, step: Step) -> None:
    objective, _ = PAIRS[name]
    tokens = tokens_of(step)
    whole = packed_loss(objective, replace(step, pieces=1), tokens)
    cut = packed_loss(objective, step, tokens)
    assert cut.item() == pytest.approx(whole.item(), abs=1e-12)
