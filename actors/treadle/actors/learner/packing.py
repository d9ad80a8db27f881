"""A rank's samples as micro-batches of packed tokens: no padding, positions restart per sequence.

A group's samples have their prompt in common. It is packed, and computed, once per micro-batch: what the model makes of
a token depends on those before it alone, so all samples of the group would get the same.

Letters: S sequences of a micro-batch, N packed tokens, n drawn tokens (targets), P tokens of a sample's prompt: those
before its first drawn one. A sequence of T tokens feeds its first T-1 to the model: position p predicts token p+1, so
the last token is a target only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle.actors.learner.layout import PackedLayout
from treadle.platform.records import TrainSample

DUMMY = (-1,)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One micro-batch.

    Example: sequences of 3 and 4 tokens whose last two tokens each were drawn, behind different prompts: lengths
    (2, 3), N = 5, position_ids [0 1 0 1 2], target_index [0 1 3 4], sequence [0 0 1 1]. Behind a prompt of one token
    in common: N = 4, position_ids [0 1 1 2] …
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
        values["layout"] = self.layout.to(device)
        return PackedBatch(**values)


def pack(samples: Sequence[TrainSample], max_tokens: int) -> list[PackedBatch]:
    """Micro-batches of at most `max_tokens` packed tokens, longest sequences first.

    Best-fit decreasing with ties by index: the same samples always give the same micro-batches. A sample goes where
    its prompt lies already, if it fits there. A sequence longer than `max_tokens` gets a micro-batch of its own.
    Sequences without a target (T < 2 or an empty mask) carry neither loss nor figures and are left out.
    """
    chosen = [i for i, sample in enumerate(samples) if sample.loss_mask[1:].any()]
    bins: list[_Bin] = []
    for index in sorted(chosen, key=lambda i: (-len(samples[i].token_ids), i)):
        sample = samples[index]
        size, prompt = len(sample.token_ids) - 1, _prompt(sample)
        fitting = [b for b in bins if b.free >= size - b.known(prompt)]
        if not fitting:
            bins.append(_Bin(max_tokens))
            fitting = bins[-1:]
        min(fitting, key=lambda b: (not b.known(prompt), b.free)).add(index, size, prompt)
    return [_packed(samples, b.members) for b in bins]


def _prompt(sample: TrainSample) -> bytes:
    return sample.token_ids[: _prompt_tokens(sample)].tobytes()


def _prompt_tokens(sample: TrainSample) -> int:
    return int(sample.loss_mask.argmax())


class _Bin:
    """A micro-batch being filled."""

    def __init__(self, capacity: int) -> None:
        self.free = capacity
        self.members: list[int] = []
        self._prompts: dict[bytes, int] = {}

    def known(self, prompt: bytes) -> int:
        """Tokens of the prompt that lie in it already: all or none."""
        return self._prompts.get(prompt, 0)

    def add(self, index: int, size: int, prompt: bytes) -> None:
        self.free -= size - self.known(prompt)
        self._prompts[prompt] = len(prompt) // np.dtype(np.int32).itemsize
        self.members.append(index)


def _places(samples: Sequence[TrainSample]) -> list[NDArray[np.int64]]:
    """Of each sample's first T-1 tokens in the packed row; equal prompts get the same."""
    prompts: dict[bytes, NDArray[np.int64]] = {}
    places, end = [], 0
    for sample in samples:
        key = _prompt(sample)
        if key not in prompts:
            prompts[key] = np.arange(end, end + _prompt_tokens(sample))
            end += len(prompts[key])
        own = np.arange(end, end + len(sample.token_ids) - 1 - len(prompts[key]))
        end += len(own)
        places.append(np.concatenate([prompts[key], own]))
    return places


def _packed(samples: Sequence[TrainSample], members: Sequence[int]) -> PackedBatch:
    chosen = [samples[i] for i in members]
    masks = [s.loss_mask[1:] for s in chosen]
    layout = PackedLayout(_places(chosen), torch.device("cpu"))
    from_sequence = layout.from_sequence
    tokens = _ints([s.token_ids[:-1] for s in chosen])
    positions = torch.from_numpy(np.concatenate([np.arange(n) for n in layout.lengths]))
    counts = [int(m.sum()) for m in masks]
    behaviour = [s.behaviour_logprobs for s in chosen]
    return PackedBatch(
        input_ids=tokens[from_sequence],
        position_ids=positions[from_sequence],
        layout=layout,
        target_index=layout.in_sequence[torch.from_numpy(np.concatenate(masks))],
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
