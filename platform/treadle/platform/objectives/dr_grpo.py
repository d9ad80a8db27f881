"""Dr. GRPO: GRPO done right ("Understanding R1-Zero-like training", arXiv 2503.20783, section 3.2).

Against GRPO: no division by the group's standard deviation (it favours prompts that are nearly always or
nearly never solved) and none by the answer's length (it favours long wrong answers). Both are replaced by
constants.

Deviations and open points:
- The paper's released code divides by the limit of new tokens; so does this, and by the number of scored
  samples of the step.
- The paper drops the KL term; `kl_coefficient` brings it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.platform.objectives.base import GroupCredit, ScoredGroup, TokenInputs
from treadle.platform.objectives.denominators import constant_length, counted
from treadle.platform.objectives.group_stats import deviations
from treadle.platform.objectives.policy_gradient import PolicyGradient, paired, refuse_negative
from treadle.platform.objectives.ratios import Surrogate, clipped_surrogate, token_ratio


@dataclass(frozen=True, kw_only=True)
class DrGrpo(PolicyGradient):
    """A_i = r_i - mean r; loss = 1/(n L) Σ_i Σ_t -min(ρ A, clip(ρ, 1-ε, 1+ε) A), L the limit of new tokens.

    Example: rewards 1, 0, 0, 1 give advantages +-0.5.
    """

    kind: str = "dr_grpo"
    eps_low: float = 0.2
    """ε below 1."""
    eps_high: float = 0.2
    """ε above 1."""

    def credit(self, groups: Sequence[ScoredGroup]) -> list[GroupCredit]:
        weights = constant_length(groups, counted(groups))
        return paired([deviations(group.rewards) for group in groups], weights)

    def surrogate(self, inputs: TokenInputs) -> Surrogate:
        return clipped_surrogate(token_ratio(inputs), inputs.advantages, self.eps_low, self.eps_high)

    def check(self) -> None:
        super().check()
        refuse_negative(eps_low=self.eps_low, eps_high=self.eps_high)
