"""The canonical coordinates in which weights are compared, encoded and digested: tensors, cut into blocks.

A layout lists pieces: whole tensors, or runs of consecutive elements of one (a shard of a flat optimizer state).
Its blocks of 65,536 elements are numbered through all pieces; none reaches across two. Sender and receiver must
have the same layout, which its fingerprint tells.

P pieces, B blocks.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.kernels.digest import table_of

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True)
class Piece:
    """`numel` elements from flat index `flat_offset` on of tensor `name`, or all of it.

    Example: `Piece("model.norm.weight", torch.bfloat16, 4096)`. Raises `ValueError` for a dtype whose elements do
    not have 1, 2 or 4 bytes, and for complex ones.
    """

    name: str
    dtype: torch.dtype
    numel: int
    flat_offset: int = 0

    def __post_init__(self) -> None:
        if self.dtype.itemsize not in INTEGERS or self.dtype.is_complex:
            raise ValueError(
                f"piece {self.name}: {self.dtype} has no delta encoding; elements must have 1, 2 or 4 bytes. "
                "Publish this tensor whole."
            )
        if self.numel < 0 or self.flat_offset < 0:
            raise ValueError(
                f"piece {self.name}: numel={self.numel} and flat_offset={self.flat_offset} are >= 0"
            )


class Layout:
    """An ordered list of pieces. Example: `Layout.of(model.state_dict().items())`."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)
        self.table, self.blocks = table_of(
            (piece.name, piece.dtype, piece.numel, piece.flat_offset) for piece in self.pieces
        )
        """[P, 6] int64 on the CPU, as the libraries read it."""

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Tensor]]) -> Layout:
        """The layout of whole tensors."""
        return cls([Piece(name, tensor.dtype, tensor.numel()) for name, tensor in tensors])

    @property
    def dense_bytes(self) -> int:
        return sum(piece.numel * piece.dtype.itemsize for piece in self.pieces)

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """16 bytes that differ for different layouts."""
        return hashlib.blake2b(repr(self.pieces).encode(), digest_size=16).digest()

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """Position of each whole tensor's piece by name."""
        return {piece.name: at for at, piece in enumerate(self.pieces)}

    @functools.lru_cache(maxsize=4)  # noqa: B019  a layout lives as long as its model, and has one or two devices
    def table_on(self, device: torch.device) -> Tensor:
        return self.table.to(device)

    def check(self, tensors: Sequence[Tensor], what: str) -> None:
        """Raises `ValueError` unless `tensors` are this layout's pieces: contiguous, of their dtype and size."""
        if len(tensors) != len(self.pieces):
            raise ValueError(f"{what}: {len(tensors)} tensors for a layout of {len(self.pieces)} pieces")
        for piece, tensor in zip(self.pieces, tensors, strict=True):
            if tensor.dtype != piece.dtype or tensor.numel() != piece.numel:
                raise ValueError(
                    f"{what}: {piece.name} is {tensor.dtype} of {tensor.numel()} elements, the layout has "
                    f"{piece.dtype} of {piece.numel}"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"{what}: {piece.name} is not contiguous; pass tensor.contiguous()")
            if tensor.device != tensors[0].device:
                raise ValueError(f"{what}: {piece.name} is on {tensor.device}, others on {tensors[0].device}")


def bit_words(numel: int) -> int:
    """32-bit words of a bitmap with a bit per element."""
    return -(-numel // 32)
