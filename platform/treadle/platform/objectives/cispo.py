"""CISPO: Clipped Importance Sampling Policy Optimization (MiniMax-M1, arXiv 2506.13585, equations 4 and 5).

The weight of a token is capped, not its gradient taken away: rare tokens that open a new line of thought keep
learning.

Deviations and open points:
- MiniMax-M1 tunes the upper bound without stating it and leaves the lower one open. The default is ScaleRL's
  (arXiv 2510.13786): weights are capped at 5. `weight_cap` is the cap itself, not an ε added to 1.
- The formula divides by the tokens of one prompt's group; this divides by the tokens of the step, as TRL
  does.
- Advantages are GRPO's; ScaleRL normalises them over the batch instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.platform.objectives.base import GroupCredit, ScoredGroup, TokenInputs
from treadle.platform.objectives.denominators import counted, mean_over_tokens
from treadle.platform.objectives.group_stats import standardised_groups
from treadle.platform.objectives.policy_gradient import PolicyGradient, paired, refuse_negative
from treadle.platform.objectives.ratios import Surrogate, token_ratio


@dataclass(frozen=True, kw_only=True)
class Cispo(PolicyGradient):
    """A_i = (r_i - mean r) / std r; loss = 1/Σ|o_i| Σ_i Σ_t -sg[min(ρ_t, cap)] A_i log π(o_t)."""

    kind: str = "cispo"
    weight_cap: float = 5.0
    """Upper bound of the importance weight."""

    takes_parts: ClassVar[bool] = True

    def credit(self, groups: Sequence[ScoredGroup]) -> list[GroupCredit]:
        weights = mean_over_tokens(groups, counted(groups))
        return paired(standardised_groups(groups), weights)

    def surrogate(self, inputs: TokenInputs) -> Surrogate:
        ratio = token_ratio(inputs)
        capped = ratio.detach().clamp(max=self.weight_cap)
        losses = -capped * inputs.advantages * inputs.logprobs
        return Surrogate(losses, ratio, (ratio > self.weight_cap).to(losses.dtype))

    def check(self) -> None:
        super().check()
        refuse_negative(weight_cap=self.weight_cap)
