"""DAPO: Decoupled Clip and Dynamic sAmpling Policy Optimization (arXiv 2503.14476, equations 8 to 13).

Deviations and open points:
- The paper's formula divides by the tokens of one prompt's group; its released code, TRL and this divide by
  the tokens of the whole step, so that every token counts the same.
- Soft overlong punishment (equation 13) is given as a share of the limit of new tokens, so that it fits any
  limit: the paper's 4,096 of 20,480 tokens is the default 0.2.
- Dynamic sampling drops groups by their rewards before the punishment, as the paper's criterion is accuracy.
- Overlong filtering (section 3.4) is off by default: the paper's final recipe replaces it by the punishment.
  It takes truncated samples out of the loss and its denominator, not out of the group's baseline.
- No KL term; `kl_coefficient` brings it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from treadle.platform.errors import ConfigError
from treadle.platform.objectives.base import GroupCredit, ScoredGroup, TokenInputs
from treadle.platform.objectives.denominators import counted, mean_over_tokens, token_limit
from treadle.platform.objectives.group_stats import standardised_groups
from treadle.platform.objectives.policy_gradient import PolicyGradient, paired, refuse_negative
from treadle.platform.objectives.ratios import Surrogate, clipped_surrogate, token_ratio


@dataclass(frozen=True, kw_only=True)
class Dapo(PolicyGradient):
    """A_i = (r_i - mean r) / std r with r_i = reward + length punishment;
    loss = 1/Σ|o_i| Σ_i Σ_t -min(ρ A, clip(ρ, 1-ε_low, 1+ε_high) A).

    Example: limit 100, `overlong_buffer=0.2`: 80 tokens cost nothing, 90 cost 0.5, 100 cost 1.
    """

    kind: str = "dapo"
    eps_low: float = 0.2
    eps_high: float = 0.28
    """Higher than `eps_low`, so that unlikely tokens can be raised."""
    drop_equal_groups: bool = True
    """Dynamic sampling: groups whose rewards are all equal are dropped and others are drawn instead."""
    overlong_buffer: float = 0.2
    """Share of the limit of new tokens over which the punishment grows from 0 to `overlong_factor`."""
    overlong_factor: float = 1.0
    """Punishment at the limit; 0 switches it off."""
    overlong_filter: bool = False
    """Take truncated samples out of the loss."""

    takes_parts: ClassVar[bool] = True

    @property
    def dynamic_sampling(self) -> bool:
        return self.drop_equal_groups

    def credit(self, groups: Sequence[ScoredGroup]) -> list[GroupCredit]:
        masks = counted(groups)
        if self.overlong_filter:
            masks = [mask & ~group.truncated for mask, group in zip(masks, groups, strict=True)]
        return paired(
            standardised_groups([self._punished(group) for group in groups]), mean_over_tokens(groups, masks)
        )

    def surrogate(self, inputs: TokenInputs) -> Surrogate:
        return clipped_surrogate(token_ratio(inputs), inputs.advantages, self.eps_low, self.eps_high)

    def _punished(self, group: ScoredGroup) -> ScoredGroup:
        """The group with the length punishment in its rewards; where parts count one by one, it is one of them."""
        punishment = self._punishment(group)
        if group.parts is None or group.part_weights is None:
            return replace(group, rewards=group.rewards - punishment)
        column = np.where(group.scored, -punishment, np.nan)
        return replace(
            group,
            parts=np.column_stack([group.parts, column]),
            part_weights=np.append(group.part_weights, 1.0),
        )

    def _punishment(self, group: ScoredGroup) -> NDArray[np.float64]:
        """[G] 0 up to (1 - buffer) of the limit, then linear to the factor (equation 13, sign turned)."""
        if self.overlong_factor == 0:
            return np.zeros(len(group.lengths))
        limit = token_limit(group)
        cache = self.overlong_buffer * limit
        return self.overlong_factor * np.clip((group.lengths - (limit - cache)) / cache, 0.0, 1.0)

    def check(self) -> None:
        super().check()
        refuse_negative(eps_low=self.eps_low, eps_high=self.eps_high, overlong_factor=self.overlong_factor)
        if not 0 < self.overlong_buffer <= 1:
            raise ConfigError(
                f"objective.overlong_buffer={self.overlong_buffer} is not a share in (0, 1].",
                "Set it to the part of the token limit that is punished, or objective.overlong_factor=0.",
            )
