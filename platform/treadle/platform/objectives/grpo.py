"""GRPO: Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, section 4.1, equations 3 and 4).

Deviations and open points:
- The paper states no ε; 0.2 is PPO's value, which every library uses.
- The standard deviation is the unbiased one and gets a floor (`group_stats`).
- DeepSeek-R1 writes the ratio per sequence and clips at ε = 10; that is `eps_low`/`eps_high` here, the level
  stays the token as in DeepSeekMath (for the sequence level take `gspo` or `rloo`).
- Samples that were not scored leave both the baseline and the denominator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.platform.objectives.base import GroupCredit, ScoredGroup, TokenInputs
from treadle.platform.objectives.denominators import counted, mean_over_samples
from treadle.platform.objectives.group_stats import standardised_groups
from treadle.platform.objectives.policy_gradient import PolicyGradient, paired, refuse_negative
from treadle.platform.objectives.ratios import Surrogate, clipped_surrogate, token_ratio


@dataclass(frozen=True, kw_only=True)
class Grpo(PolicyGradient):
    """A_i = (r_i - mean r) / std r; loss = 1/G Σ_i 1/|o_i| Σ_t [-min(ρ A, clip(ρ, 1-ε, 1+ε) A) + β KL_t].

    Example: rewards 1, 0, 0, 1 give advantages +-0.866.
    """

    kind: str = "grpo"
    kl_coefficient: float = 0.04
    """β, the paper's value for its 7B model; DeepSeek-R1 has 0.001."""
    eps_low: float = 0.2
    """ε below 1."""
    eps_high: float = 0.2
    """ε above 1."""

    takes_parts: ClassVar[bool] = True

    def credit(self, groups: Sequence[ScoredGroup]) -> list[GroupCredit]:
        weights = mean_over_samples(groups, counted(groups))
        return paired(standardised_groups(groups), weights)

    def surrogate(self, inputs: TokenInputs) -> Surrogate:
        return clipped_surrogate(token_ratio(inputs), inputs.advantages, self.eps_low, self.eps_high)

    def check(self) -> None:
        super().check()
        refuse_negative(eps_low=self.eps_low, eps_high=self.eps_high)
