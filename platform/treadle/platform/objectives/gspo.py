"""GSPO: Group Sequence Policy Optimization (arXiv 2507.18071, equations 5 to 7).

The ratio belongs to the sequence: s_i = (π(o_i) / π_old(o_i))^(1/|o_i|), the geometric mean of the token
ratios. Every token carries it, and a sequence's tokens weigh 1/|o_i|, so they add up to the paper's term.
With one advantage per sequence GSPO-token (equation 13) has the same value and the same gradient.

Deviations and open points:
- The ε values are those of section 5.1 (four mini-batches per rollout). With a single update per rollout the
  ratio is 1 and they do not act.
- With truncated importance weights a sequence's loss is weighted by the mean of its tokens' weights.
- No KL term in the experiments; `kl_coefficient` brings one back, per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from treadle.platform.objectives.base import GroupCredit, ScoredGroup, TokenInputs
from treadle.platform.objectives.denominators import counted, mean_over_samples
from treadle.platform.objectives.group_stats import standardised_groups
from treadle.platform.objectives.policy_gradient import PolicyGradient, paired, refuse_negative
from treadle.platform.objectives.ratios import (
    Surrogate,
    clipped_surrogate,
    sequence_lengths,
    sequence_log_ratio,
)


@dataclass(frozen=True, kw_only=True)
class Gspo(PolicyGradient):
    """A_i = (r_i - mean r) / std r; loss = 1/G Σ_i -min(s_i A_i, clip(s_i, 1-ε_low, 1+ε_high) A_i)."""

    kind: str = "gspo"
    eps_low: float = 3e-4
    eps_high: float = 4e-4

    takes_parts: ClassVar[bool] = True

    def credit(self, groups: Sequence[ScoredGroup]) -> list[GroupCredit]:
        weights = mean_over_samples(groups, counted(groups))
        return paired(standardised_groups(groups), weights)

    def surrogate(self, inputs: TokenInputs) -> Surrogate:
        ratio = torch.exp(sequence_log_ratio(inputs) / sequence_lengths(inputs))[inputs.sequence]
        return clipped_surrogate(ratio, inputs.advantages, self.eps_low, self.eps_high)

    def check(self) -> None:
        super().check()
        refuse_negative(eps_low=self.eps_low, eps_high=self.eps_high)
