"""Where the sequences of a micro-batch lie in its packed row, and how they are laid side by side for attention.

Letters: S sequences of L_s tokens, N packed tokens, L the longest sequence. Sequences that begin alike may share the
packed tokens of their beginning: then N is less than the sum of their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BUCKET_FILL = 0.7  # a sequence shorter than this part of its bucket's longest opens the next bucket


class PackedLayout:
    """`places[s]` [L_s] int64 are the packed positions of sequence s, in order.

    Example: two sequences of 3 and 4 tokens with the first two in common: places [0 1 2] and [0 1 3 4 5], N = 6.

    Buckets hold sequences of similar length, so that laying a long-tailed batch out as rectangles wastes
    little; they are made once per micro-batch and used by all layers.
    """

    def __init__(self, places: Sequence[NDArray[np.int64]], device: torch.device) -> None:
        self.places = tuple(places)
        self.device = device
        self.lengths = tuple(len(own) for own in places)
        self.max_length = max(self.lengths)
        self.total = 1 + max(int(own[-1]) for own in places)

    @classmethod
    def apart(cls, lengths: Sequence[int], device: torch.device) -> PackedLayout:
        """Sequences one after the other, with nothing in common."""
        return cls(np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]), device)

    def to(self, device: torch.device) -> PackedLayout:
        return PackedLayout(self.places, device)

    @property
    def shares(self) -> bool:
        """Whether some packed token belongs to several sequences."""
        return self.total < sum(self.lengths)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[S+1] int32, running sum of the lengths."""
        return torch.tensor(np.cumsum([0, *self.lengths]), dtype=torch.int32, device=self.device)

    @cached_property
    def in_sequence(self) -> Tensor:
        """[Σ L_s] int64: the packed positions of all sequences, one after the other."""
        return torch.from_numpy(np.concatenate(self.places)).to(self.device)

    @cached_property
    def from_sequence(self) -> Tensor:
        """[N] int64: where each packed token stands in `in_sequence`; one that is shared, in its first sequence."""
        return self._found(np.concatenate(self.places))

    @cached_property
    def padded_index(self) -> Tensor:
        """[S, L] int64: the packed position at each place; a place past a sequence's end repeats its last."""
        return self._rectangle(range(len(self.lengths)))

    @cached_property
    def packed_index(self) -> Tensor:
        """[N] int64: the place in the flattened [S, L] rectangle of each packed token."""
        return self._found(self.padded_index.cpu().numpy().reshape(-1))

    @cached_property
    def buckets(self) -> list[Tensor]:
        """Rectangles [S_b, L_b] int64 of packed positions, longest first."""
        return [self._rectangle(members) for members in self._bucket_members]

    @cached_property
    def bucket_places(self) -> Tensor:
        """[N] int64: the place of each packed token in the buckets, flattened one after another."""
        return self._found(np.concatenate([bucket.cpu().numpy().reshape(-1) for bucket in self.buckets]))

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

    def _rectangle(self, members: Sequence[int]) -> Tensor:
        width = max(self.lengths[i] for i in members)
        rows = [np.pad(self.places[i], (0, width - self.lengths[i]), mode="edge") for i in members]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def _found(self, laid_out: NDArray[np.int64]) -> Tensor:
        """[N]: for each packed token the first place where `laid_out` has it. Padding repeats a sequence's last token
        behind it, so the first place is never padding."""
        found = np.empty(self.total, dtype=np.int64)
        found[laid_out[::-1]] = np.arange(len(laid_out))[::-1]
        return torch.from_numpy(found).to(self.device)
