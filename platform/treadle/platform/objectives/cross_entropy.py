"""Cross-entropy for pretraining, SFT and distillation from verified samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from treadle.platform.objectives.base import GroupCredit, ScoredGroup, TokenInputs, TokenLosses
from treadle.platform.objectives.denominators import counted, mean_over_tokens


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """loss_t = -a_t log π(o_t). With a = 1 and weights 1/(target tokens of the step) the step's loss is the
    mean cross-entropy; supervised samples carry both themselves (`TrainSample`), drawn groups get them by
    `credit`: every scored sample is a target, and the caller passes on only those worth imitating."""

    kind: str = "cross_entropy"

    needs_groups: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    takes_parts: ClassVar[bool] = False
    dynamic_sampling: ClassVar[bool] = False

    def credit(self, groups: Sequence[ScoredGroup]) -> list[GroupCredit]:
        weights = mean_over_tokens(groups, counted(groups, at_least=1))
        return [GroupCredit(advantages=(w > 0).astype(np.float64), weights=w) for w in weights]

    def token_losses(self, inputs: TokenInputs) -> TokenLosses:
        return TokenLosses(losses=-inputs.advantages * inputs.logprobs, metrics={})

    def check(self) -> None:
        """Nothing can be set wrongly."""
