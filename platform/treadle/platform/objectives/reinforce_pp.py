"""REINFORCE++ with baseline (arXiv 2501.03262, the variant "w/ Baseline").

The group's mean is the baseline; the scale comes from the whole batch, because a group's own standard
deviation depends on the very rewards it divides.

Deviations and open points:
- Deviations from the group's mean add up to 0 in every group, so the batch's mean is 0 and is not subtracted
  again: a group with equal rewards keeps advantages of exactly 0.
- The paper's tokens are normalised with their multiplicity in some implementations (a long answer counts more
  in the batch's standard deviation); here every sample counts once.
- The KL term is a loss with k2, the estimator the paper argues for. Its coefficient is left at 0 for
  verifiable rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treadle.platform.objectives.base import GroupCredit, ScoredGroup, TokenInputs
from treadle.platform.objectives.denominators import counted, mean_over_samples
from treadle.platform.objectives.group_stats import STD_FLOOR, deviations
from treadle.platform.objectives.policy_gradient import PolicyGradient, paired, refuse_negative
from treadle.platform.objectives.ratios import Surrogate, clipped_surrogate, token_ratio


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(PolicyGradient):
    """A'_i = r_i - mean of its group; A_i = A'_i / std of A' over the batch;
    loss = 1/n Σ_i 1/|o_i| Σ_t -min(ρ A, clip(ρ, 1-ε, 1+ε) A)."""

    kind: str = "reinforce_pp"
    kl_estimator: str = "k2"
    eps_low: float = 0.2
    eps_high: float = 0.2

    def credit(self, groups: Sequence[ScoredGroup]) -> list[GroupCredit]:
        masks = counted(groups)
        centred = [deviations(group.rewards) for group in groups]
        batch = np.concatenate([a[mask] for a, mask in zip(centred, masks, strict=True)] or [np.zeros(0)])
        scale = batch.std(ddof=1) + STD_FLOOR if len(batch) > 1 else 1.0
        return paired([a / scale for a in centred], mean_over_samples(groups, masks))

    def surrogate(self, inputs: TokenInputs) -> Surrogate:
        return clipped_surrogate(token_ratio(inputs), inputs.advantages, self.eps_low, self.eps_high)

    def check(self) -> None:
        super().check()
        refuse_negative(eps_low=self.eps_low, eps_high=self.eps_high)
