"""Statistics of a group's rewards that leave out samples which were not scored (NaN).

Letters: G samples of a group, r [G] their rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from treadle.platform.objectives.base import ScoredGroup

Rewards = NDArray[np.float64]

STD_FLOOR = 1e-4
"""Added to a standard deviation before dividing. No paper states one; this is TRL's value (verl has 1e-6)."""


def scored(rewards: Rewards) -> NDArray[np.bool_]:
    """[G] True where the verifier gave a reward."""
    return ~np.isnan(rewards)


def informative(rewards: Rewards) -> bool:
    """Whether the scored rewards differ, so that a group baseline leaves a gradient. A group with fewer than
    two scored samples is not informative."""
    values = rewards[scored(rewards)]
    return len(values) > 1 and bool(values.max() > values.min())


def deviations(rewards: Rewards) -> Rewards:
    """r - mean(r) over the scored samples; 0 where not scored.

    All-equal rewards give exact zeros: the rounding of their mean must not become a direction.
    """
    result = np.zeros(len(rewards))
    if informative(rewards):
        keep = scored(rewards)
        result[keep] = rewards[keep] - rewards[keep].mean()
    return result


def standardised(rewards: Rewards) -> Rewards:
    """(r - mean(r)) / (std(r) + STD_FLOOR) with the unbiased standard deviation (n - 1), as TRL and verl do;
    DeepSeekMath does not say which."""
    if not informative(rewards):
        return np.zeros(len(rewards))
    return deviations(rewards) / (rewards[scored(rewards)].std(ddof=1) + STD_FLOOR)


def standardised_groups(groups: Sequence[ScoredGroup]) -> list[Rewards]:
    """Advantages [G] of every group: its standardised rewards, or by GDPO where its parts are given.

    GDPO (arXiv 2601.05242): each part k is standardised within the group, z_k; a sample's sum Σ_k w_k z_k is then
    standardised over all scored samples of the step, which keeps its size independent of the number of parts.
    """
    if not groups or any(group.parts is None for group in groups):
        return [standardised(group.rewards) for group in groups]
    sums = [_sum_of_parts(group) for group in groups]
    every = np.concatenate([values[group.scored] for values, group in zip(sums, groups, strict=True)])
    if len(every) < 2 or every.max() == every.min():
        return [np.zeros(len(group.rewards)) for group in groups]
    spread = every.std(ddof=1) + STD_FLOOR
    return [
        np.where(group.scored, (values - every.mean()) / spread, 0.0)
        for values, group in zip(sums, groups, strict=True)
    ]


def _sum_of_parts(group: ScoredGroup) -> Rewards:
    """[G] Σ_k w_k z_k; 0 where not scored."""
    assert group.parts is not None
    assert group.part_weights is not None
    total = np.zeros(len(group.rewards))
    for column, weight in zip(group.parts.T, group.part_weights, strict=True):
        total += weight * standardised(column)
    return total


def leave_one_out(rewards: Rewards) -> Rewards:
    """r_i - mean of the other scored samples = (r_i - mean) * n / (n - 1)."""
    n = int(scored(rewards).sum())
    return deviations(rewards) * n / max(n - 1, 1)
