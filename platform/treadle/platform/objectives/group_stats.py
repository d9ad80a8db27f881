"""Statistics of a group's rewards that leave out samples which were not scored (NaN).

Letters: G samples of a group, r [G] their rewards.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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


def leave_one_out(rewards: Rewards) -> Rewards:
    """r_i - mean of the other scored samples = (r_i - mean) * n / (n - 1)."""
    n = int(scored(rewards).sum())
    return deviations(rewards) * n / max(n - 1, 1)
