"""The step's one denominator, spread over tokens. Nothing else in Treadle divides by a number of tokens,
samples or ranks, so packing, accumulation and data parallelism cannot change a loss.

Each function takes every group of the step and returns, per group, the weight [G] that one token of a sample
carries. Samples that do not count get 0: their tokens are in no sum and in no denominator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from treadle.platform.objectives.base import ScoredGroup
from treadle.platform.objectives.group_stats import scored

Mask = NDArray[np.bool_]
Weights = NDArray[np.float64]


def counted(groups: Sequence[ScoredGroup], at_least: int = 2) -> list[Mask]:
    """[G] per group: scored samples with at least one drawn token, in groups with `at_least` scored samples
    (below two, a group has no baseline)."""
    return [
        scored(group.rewards) & (group.lengths > 0) & (scored(group.rewards).sum() >= at_least)
        for group in groups
    ]


def mean_over_samples(groups: Sequence[ScoredGroup], masks: Sequence[Mask]) -> list[Weights]:
    """1 / (n |o_i|): the mean over the step's n counted samples of each sample's mean over its tokens.

    With equally many counted samples per group this is the papers' mean over prompts of the mean over a
    group; where samples failed, every scored sample still counts the same.
    """
    n = sum(int(mask.sum()) for mask in masks)
    return [
        _where(mask, 1.0 / (n * np.maximum(group.lengths, 1.0))) if n else np.zeros(len(mask))
        for group, mask in zip(groups, masks, strict=True)
    ]


def mean_over_tokens(groups: Sequence[ScoredGroup], masks: Sequence[Mask]) -> list[Weights]:
    """1 / Σ|o_i|: every counted token of the step counts the same."""
    total = sum(int(group.lengths[mask].sum()) for group, mask in zip(groups, masks, strict=True))
    return [_where(mask, 1.0 / max(total, 1)) for mask in masks]


def constant_length(groups: Sequence[ScoredGroup], masks: Sequence[Mask]) -> list[Weights]:
    """1 / (n L) with L the limit of new tokens: the length of an answer enters no denominator."""
    n = max(sum(int(mask.sum()) for mask in masks), 1)
    return [_where(mask, 1.0 / (n * token_limit(group))) for group, mask in zip(groups, masks, strict=True)]


def token_limit(group: ScoredGroup) -> int:
    """The limit of new tokens the group was drawn with. Raises ValueError where it is not given."""
    if group.max_new_tokens < 1:
        raise ValueError("ScoredGroup.max_new_tokens is not set, but this objective needs the sampling limit")
    return group.max_new_tokens


def _where(mask: Mask, weights: Weights | float) -> Weights:
    return np.where(mask, weights, 0.0)
