"""Supervised rows, and a step's batch of them dealt over the learner's ranks."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treadle.platform.errors import DataError
from treadle.platform.records import StepBatch, TrainSample
from treadle.workflows.data.permutation import Epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One sequence to learn: `loss_mask` marks the targets (never the first token, which nothing predicts).

    Example: `47+85=` with a chain of 20 tokens and EOS: T = 27, the mask is 6 × False, 21 × True.
    """

    token_ids: NDArray[np.int32]  # [T]
    loss_mask: NDArray[np.bool_]  # [T]

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.loss_mask):
            raise ValueError(f"TokenRow: {len(self.token_ids)} tokens but a mask of {len(self.loss_mask)}")
        if len(self.loss_mask) and self.loss_mask[0]:
            raise ValueError("TokenRow: the first token cannot be a target")


class RowSource(Protocol):
    """An endless, deterministic order of rows; the cursor is the index."""

    def at(self, index: int) -> TokenRow: ...

    def __len__(self) -> int:
        """Rows in one epoch."""
        ...


class RowList:
    """Rows held in memory, in an order that follows from the seed; `skipped` counts rows left out."""

    def __init__(self, rows: Sequence[TokenRow], *, seed: int, skipped: int = 0) -> None:
        if not rows:
            raise DataError(
                "There is no row to learn from.", "Check the data and how many rows were skipped."
            )
        self._rows, self.skipped = rows, skipped
        self._order = Epochs(len(rows), "rows", seed)

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, index: int) -> TokenRow:
        return self._rows[self._order.at(index)]


def batches(source: RowSource, *, rows_per_step: int, ranks: int) -> Callable[[int], StepBatch]:
    """step → batch: step s takes the rows from s · rows_per_step on. The same step gives the same batch in
    every process."""

    def batch(step: int) -> StepBatch:
        first = step * rows_per_step
        rows = [source.at(first + i) for i in range(rows_per_step)]
        return supervised_batch(rows, ranks=ranks, step=step)

    return batch


def supervised_batch(rows: Sequence[TokenRow], *, ranks: int, step: int) -> StepBatch:
    """One step over these rows: advantages 1 and weights 1/(targets of the step), so that the summed loss is
    the mean cross-entropy per target however the rows are dealt. Raises DataError without a single target."""
    targets = sum(int(row.loss_mask.sum()) for row in rows)
    if targets == 0:
        raise DataError(f"Step {step} has no target token in {len(rows)} rows.", "Check the completions.")
    dealt = longest_first([len(row.token_ids) for row in rows], ranks)
    weight = np.float32(1.0 / targets)
    return StepBatch(
        step=step, rows=tuple(tuple(_train_sample(rows[i], weight) for i in share) for share in dealt)
    )


def longest_first(tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Deals items to ranks: longest first, each to the rank with the fewest tokens so far, ties to the lower
    index. At most 4/3 of the best possible balance (Graham 1969), and deterministic. Items of a rank come in
    their original order."""
    loads = [(0, rank) for rank in range(ranks)]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for item in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(item)
        heapq.heappush(loads, (load + tokens[item], rank))
    return [sorted(items) for items in dealt]


def _train_sample(row: TokenRow, weight: np.float32) -> TrainSample:
    n = len(row.token_ids)
    return TrainSample(
        token_ids=row.token_ids,
        loss_mask=row.loss_mask,
        advantages=np.ones(n, dtype=np.float32),
        weights=np.full(n, weight, dtype=np.float32),
        behaviour_logprobs=None,
    )
