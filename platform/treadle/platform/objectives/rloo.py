"""RLOO: REINFORCE Leave-One-Out ("Back to Basics", arXiv 2402.14740, section 3.3; Kool et al. 2019).

The whole answer is one action: its log-probability is the sum over its tokens.

Deviations and open points:
- The paper's gradient has no importance ratio. Here the answer's ratio stands in for its log-probability and
  is clipped as in PPO, so that more than one update per rollout is sound; at the first update ratio is 1 and
  the gradient is the paper's.
- The paper takes KL off the reward of a preference model. Verifiable rewards need none, so β is 0; where it
  is set, it acts in the loss, per token, averaged over a sample.
- With truncated importance weights a sequence's loss is weighted by the mean of its tokens' weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from treadle.platform.objectives.base import GroupCredit, ScoredGroup, TokenInputs
from treadle.platform.objectives.denominators import counted, mean_over_samples
from treadle.platform.objectives.group_stats import leave_one_out
from treadle.platform.objectives.policy_gradient import PolicyGradient, paired, refuse_negative
from treadle.platform.objectives.ratios import Surrogate, clipped_surrogate, sequence_log_ratio


@dataclass(frozen=True, kw_only=True)
class Rloo(PolicyGradient):
    """A_i = r_i - mean of the others' r; loss = 1/n Σ_i -min(ρ_i A_i, clip(ρ_i, 1-ε, 1+ε) A_i), with
    ρ_i = π(o_i) / π_old(o_i). Each of a sample's tokens carries its term and weighs 1/(n |o_i|).

    Example: rewards 1, 0, 0, 1 give advantages +-2/3.
    """

    kind: str = "rloo"
    eps_low: float = 0.2
    eps_high: float = 0.2

    def credit(self, groups: Sequence[ScoredGroup]) -> list[GroupCredit]:
        weights = mean_over_samples(groups, counted(groups))
        return paired([leave_one_out(group.rewards) for group in groups], weights)

    def surrogate(self, inputs: TokenInputs) -> Surrogate:
        ratio = torch.exp(sequence_log_ratio(inputs))[inputs.sequence]
        return clipped_surrogate(ratio, inputs.advantages, self.eps_low, self.eps_high)

    def check(self) -> None:
        super().check()
        refuse_negative(eps_low=self.eps_low, eps_high=self.eps_high)
