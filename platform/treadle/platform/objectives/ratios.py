"""Importance ratios and what is done to keep them in bounds.

Letters: ρ ratio of the policy to the policy at the start of the step, A advantage, N tokens of a packed
micro-batch, S sequences in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from treadle.platform.objectives.base import TokenInputs


@dataclass(frozen=True, slots=True)
class Surrogate:
    """Losses [N] of the policy term, the ratio [N] they were built on, and `clipped` [N], 1 where clipping
    took the gradient away or capped the weight."""

    losses: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor


def token_ratio(inputs: TokenInputs) -> torch.Tensor:
    """ρ_t = π(o_t) / π_old(o_t), [N]."""
    return torch.exp(inputs.logprobs - inputs.old_logprobs)


def sequence_log_ratio(inputs: TokenInputs) -> torch.Tensor:
    """Σ_t log ρ_t per sequence, [S]. A sequence is never split over micro-batches, so the sum is whole."""
    log_ratio = inputs.logprobs - inputs.old_logprobs
    return log_ratio.new_zeros(inputs.n_sequences).index_add(0, inputs.sequence, log_ratio)


def sequence_lengths(inputs: TokenInputs) -> torch.Tensor:
    """Drawn tokens per sequence, [S], at least 1."""
    return torch.bincount(inputs.sequence, minlength=inputs.n_sequences).clamp(min=1)


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, eps_low: float, eps_high: float
) -> Surrogate:
    """-min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A) (PPO, arXiv 1707.06347, equation 7)."""
    bounded = ratio.clamp(1 - eps_low, 1 + eps_high)
    losses = -torch.min(ratio * advantages, bounded * advantages)
    clipped = ((ratio > 1 + eps_high) & (advantages > 0)) | ((ratio < 1 - eps_low) & (advantages < 0))
    return Surrogate(losses, ratio, clipped.to(losses.dtype))


def truncated_weight(inputs: TokenInputs, cap: float) -> torch.Tensor | None:
    """min(π_old / π_behaviour, C) per token, without gradient, [N]; None where it does not apply.

    π_behaviour is the engine that drew the token: older by up to η versions, and different in its kernels.
    Truncation bounds the variance at the price of a bias towards no update (Ionides 2008; used for the
    engine-learner mismatch of language models with C = 2).
    """
    if inputs.behaviour_logprobs is None or cap <= 0:
        return None
    return torch.exp((inputs.old_logprobs - inputs.behaviour_logprobs).detach()).clamp(max=cap)
