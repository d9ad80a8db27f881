"""A rank's samples as micro-batches of packed tokens: no padding, positions restart per sequence.

Letters: S sequences of a micro-batch, N packed tokens (the sum of their input lengths), n drawn tokens
(targets). A sequence of T tokens feeds its first T-1 to the model: position p predicts token p+1, so the last
token is a target only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle.platform.records import TrainSample

DUMMY = (-1,)
BUCKET_FILL = 0.7  # a sequence shorter than this part of its bucket's longest opens the next bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One micro-batch.

    Example: sequences of 3 and 4 tokens whose last two tokens each were drawn: lengths (2, 3), N = 5,
    position_ids [0 1 0 1 2], cu_seqlens [0 2 5], targets of packed positions [0 1 3 4], sequence [0 0 1 1].
    """

    input_ids: Tensor  # [N] int64
    position_ids: Tensor  # [N] int64
    layout: PackedLayout
    target_index: Tensor  # [n] int64, the packed position whose hidden state predicts the target
    targets: Tensor  # [n] int64, token ids
    advantages: Tensor  # [n] fp32
    weights: Tensor  # [n] fp32
    behaviour_logprobs: Tensor | None  # [n] fp32
    sequence: Tensor  # [n] int64 in [0, S)
    samples: tuple[int, ...]  # [S], which of the rank's samples each sequence is; -1 in a dummy

    @property
    def n_sequences(self) -> int:
        return len(self.samples)

    @property
    def is_dummy(self) -> bool:
        return self.samples == DUMMY

    def to(self, device: torch.device) -> PackedBatch:
        if device.type == "cpu":
            return self
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device, non_blocking=True)
        values["layout"] = PackedLayout(self.layout.lengths, device)
        return PackedBatch(**values)


class PackedLayout:
    """Where each sequence lies in the packed row, and how to lay sequences side by side for attention.

    Buckets hold sequences of similar length, so that laying a long-tailed batch out as rectangles wastes
    little; they are made once per micro-batch and used by all layers.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.device = device
        self.max_length = max(self.lengths)
        self.total = sum(self.lengths)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[S+1] int32, running sum of the lengths."""
        return torch.tensor(np.cumsum([0, *self.lengths]), dtype=torch.int32, device=self.device)

    @cached_property
    def padded_index(self) -> Tensor:
        """[S, L] int64: the packed position at each place; a place past a sequence's end repeats its last."""
        return self._rectangle(range(len(self.lengths)))

    @cached_property
    def packed_index(self) -> Tensor:
        """[N] int64: the place in the flattened [S, L] rectangle of each packed token."""
        return self._places([list(range(len(self.lengths)))])

    @cached_property
    def buckets(self) -> list[Tensor]:
        """Rectangles [S_b, L_b] int64 of packed positions, longest first."""
        return [self._rectangle(members) for members in self._bucket_members]

    @cached_property
    def bucket_places(self) -> Tensor:
        """[N] int64: the place of each packed token in the buckets, flattened one after another."""
        return self._places(self._bucket_members)

    @cached_property
    def _bucket_members(self) -> list[list[int]]:
        members: list[list[int]] = []
        limit = 0.0
        for index in sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i]):
            if self.lengths[index] < limit or not members:
                members.append([])
                limit = 0.0
            if not members[-1]:
                limit = BUCKET_FILL * self.lengths[index]
            members[-1].append(index)
        return members

    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *self.lengths])[:-1]

    def _rectangle(self, members: Sequence[int]) -> Tensor:
        starts = self._starts()[list(members)]
        lengths = np.asarray(self.lengths)[list(members)]
        steps = np.minimum(np.arange(lengths.max())[None, :], lengths[:, None] - 1)
        return torch.from_numpy(starts[:, None] + steps).to(self.device)

    def _places(self, buckets: Sequence[Sequence[int]]) -> Tensor:
        starts = self._starts()
        places = np.empty(self.total, dtype=np.int64)
        offset = 0
        for members in buckets:
            width = max(self.lengths[i] for i in members)
            for row, i in enumerate(members):
                first = offset + row * width
                places[starts[i] : starts[i] + self.lengths[i]] = np.arange(first, first + self.lengths[i])
            offset += width * len(members)
        return torch.from_numpy(places).to(self.device)


def pack(samples: Sequence[TrainSample], max_tokens: int) -> list[PackedBatch]:
    """Micro-batches of at most `max_tokens` packed tokens, longest sequences first.

    Best-fit decreasing with ties by index: the same samples always give the same micro-batches. A sequence
    longer than `max_tokens` gets one of its own. Sequences without a target (T < 2 or an empty mask) carry
    neither loss nor figures and are left out.
    """
    sizes = {i: len(s.token_ids) - 1 for i, s in enumerate(samples) if s.loss_mask[1:].any()}
    return [_packed(samples, members) for members in _best_fit(sizes, max_tokens)]


def _best_fit(sizes: dict[int, int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(sizes, key=lambda i: (-sizes[i], i)):
        size = sizes[index]
        fitting = [b for b in range(len(bins)) if free[b] >= size]
        if fitting:
            best = min(fitting, key=lambda b: (free[b], b))
            bins[best].append(index)
            free[best] -= size
        else:
            bins.append([index])
            free.append(capacity - size)
    return bins


def _packed(samples: Sequence[TrainSample], members: Sequence[int]) -> PackedBatch:
    chosen = [samples[i] for i in members]
    lengths = [len(s.token_ids) - 1 for s in chosen]
    starts = np.cumsum([0, *lengths])[:-1]
    masks = [s.loss_mask[1:] for s in chosen]
    positions = np.concatenate([np.arange(n) for n in lengths])
    target_index = np.concatenate([np.flatnonzero(m) + o for m, o in zip(masks, starts, strict=True)])
    counts = [int(m.sum()) for m in masks]
    behaviour = [s.behaviour_logprobs for s in chosen]
    return PackedBatch(
        input_ids=_ints([s.token_ids[:-1] for s in chosen]),
        position_ids=torch.from_numpy(positions),
        layout=PackedLayout(lengths, torch.device("cpu")),
        target_index=torch.from_numpy(target_index),
        targets=_ints([s.token_ids[1:][m] for s, m in zip(chosen, masks, strict=True)]),
        advantages=_floats([s.advantages[1:][m] for s, m in zip(chosen, masks, strict=True)]),
        weights=_floats([s.weights[1:][m] for s, m in zip(chosen, masks, strict=True)]),
        behaviour_logprobs=_behaviour(behaviour, masks),
        sequence=torch.from_numpy(np.repeat(np.arange(len(chosen)), counts)),
        samples=tuple(members),
    )


def _behaviour(
    values: Sequence[NDArray[np.float32] | None], masks: Sequence[NDArray[np.bool_]]
) -> Tensor | None:
    """The engine's log-probabilities, if every sequence has them (a batch is drawn or it is supervised)."""
    present = [v for v in values if v is not None]
    if len(present) < len(values):
        return None
    return _floats([v[1:][m] for v, m in zip(present, masks, strict=True)])


def _ints(arrays: Sequence[NDArray[np.int32]]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64))


def _floats(arrays: Sequence[NDArray[np.float32]]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.float32))


def dummy_batch() -> PackedBatch:
    """A two-token sequence of weight 0, run by a rank that has fewer micro-batches than another so that all
    take part in the same collectives. It adds exactly zero to loss and gradient, and to no figure."""
    zero = np.zeros(2, dtype=np.float32)
    sample = TrainSample(
        token_ids=np.zeros(2, dtype=np.int32),
        loss_mask=np.array([False, True]),
        advantages=zero,
        weights=zero,
        behaviour_logprobs=zero,
    )
    return replace(_packed([sample], [0]), samples=DUMMY)
