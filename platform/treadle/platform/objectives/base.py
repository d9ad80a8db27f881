"""What an objective is: credit within a step, and a loss per token. One small file per algorithm.

The split keeps the learner blind to algorithms and its loss free of denominators: an objective runs once on
the driver over all groups of a step and turns rewards into `(advantage, weight)` per sample, where the
weights already carry the step's one global denominator; on the learner it maps log-probabilities to a loss
per token. The step's loss is `sum(weights * token_losses)` over all tokens of all ranks and micro-batches, so
packing, accumulation and data parallelism cannot change it.

Letters: N tokens in a micro-batch (packed, no padding), S sequences in it, G samples of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group's outcome as the driver knows it. `rewards` is NaN where a sample was not scored (failed or
    timed out): such a sample takes part in no baseline and gets weight 0."""

    rewards: NDArray[np.float64]  # [G]
    lengths: NDArray[np.int64]  # [G] drawn tokens
    truncated: NDArray[np.bool_]  # [G] ended by length
    max_new_tokens: int = 0
    """The limit the group was drawn with; objectives with a constant normaliser or a length penalty need
    it."""
    parts: NDArray[np.float64] | None = None
    """[G, K] the K reward parts one by one, where they are to be standardised one by one; NaN where a sample was not
    scored."""
    part_weights: NDArray[np.float64] | None = None  # [K]

    @property
    def scored(self) -> NDArray[np.bool_]:
        """[G] True where the verifier gave a reward."""
        return ~np.isnan(self.rewards)

    @property
    def informative(self) -> bool:
        """Whether the scored rewards differ (or a part of them, where parts count one by one), so that a group
        baseline leaves a gradient."""
        columns = self.rewards[:, None] if self.parts is None else self.parts
        kept = columns[self.scored]
        return len(kept) > 1 and bool((np.ptp(kept, axis=0) > 0).any())

    def __post_init__(self) -> None:
        if not len(self.rewards) == len(self.lengths) == len(self.truncated):
            raise ValueError(
                f"ScoredGroup: {len(self.rewards)} rewards, {len(self.lengths)} lengths and "
                f"{len(self.truncated)} truncated flags; all three must be [G]"
            )
        if np.isinf(self.rewards).any():
            raise ValueError(
                f"ScoredGroup: rewards {self.rewards} hold an infinity; an unscored sample is NaN"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCredit:
    """`weights` are per token of the sample: a token's loss counts `weight` times in the step's sum."""

    advantages: NDArray[np.float64]  # [G]
    weights: NDArray[np.float64]  # [G]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInputs:
    """One micro-batch, packed. Positions outside the loss mask were removed: every entry is a drawn token."""

    logprobs: torch.Tensor  # [N], carries the gradient
    old_logprobs: (
        torch.Tensor
    )  # [N], the policy at the start of the step (detached logprobs if it never moved)
    behaviour_logprobs: torch.Tensor | None  # [N], the engine's; None if nothing was drawn
    ref_logprobs: torch.Tensor | None  # [N], the reference policy's; None without a KL term
    advantages: torch.Tensor  # [N]
    sequence: torch.Tensor  # [N] int64, which of the S sequences a token belongs to
    n_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLosses:
    """`losses` [N] are not yet weighted. `metrics` are per-token values [N], detached, which the learner
    averages over all drawn tokens of the step (names without prefix):

    `ratio` importance ratio to the policy at the start of the step · `clip_fraction` 1 where clipping took
    the gradient away (or capped the weight) · `is_weight` truncated weight against the engine's
    log-probability · `kl` estimate against the reference. A name is absent where its inputs were not given.
    """

    losses: torch.Tensor
    metrics: Mapping[str, torch.Tensor]


@runtime_checkable
class Objective(Protocol):
    """An algorithm. Implementations are frozen dataclasses (their fields are the configuration)."""

    @property
    def needs_groups(self) -> bool:
        """Whether the baseline is the group's, so that group_size=1 cannot work."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether `ref_logprobs` are used (a KL coefficient above 0)."""
        ...

    @property
    def takes_parts(self) -> bool:
        """Whether reward parts can be standardised one by one (`ScoredGroup.parts`)."""
        ...

    @property
    def dynamic_sampling(self) -> bool:
        """Whether the workflow drops groups whose scored rewards are all equal and draws others instead."""
        ...

    def credit(self, groups: Sequence[ScoredGroup]) -> list[GroupCredit]:
        """Advantages and token weights for all groups of one step."""
        ...

    def token_losses(self, inputs: TokenInputs) -> TokenLosses: ...
