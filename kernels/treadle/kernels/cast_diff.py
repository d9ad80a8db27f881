"""The optimizer's copy from fp32 masters to bf16 parameters, which notices what it changes.

At the moment of that copy the old parameter is still in memory: comparing costs no snapshot and no second pass.
What changed is kept as one bit per element, OR-ed over optimizer steps until the next publication; an element that
changes and changes back stays marked, which is a superset and harmless. The digest of the parameters is carried
along, at a cost per changed element.

P pieces of a layout, n elements of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treadle.kernels import native
from treadle.kernels.digest import Partial, signed
from treadle.kernels.digest import elements_digest_lanes_eager as lanes_at
from treadle.kernels.layout import Layout, bit_words
from treadle.kernels.native import addresses
from treadle.kernels.registry import op, writes_only


class CastDiff:
    """Rounds masters into parameters and keeps account of what changed since `clear`.

    masters: P contiguous fp32 tensors; parameters: P contiguous bf16 tensors of the same sizes, the pieces of
    `layout`, on one device. Both are written to by others between steps, and not replaced. Raises `ValueError` for
    anything else.

    Example, at the end of an optimizer's step: `cast.step()`; to publish: `encode_delta(layout, cast.parameters,
    dirty=cast.dirty, …)`, then `cast.clear()`.
    """

    def __init__(self, layout: Layout, masters: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        layout.check(parameters, "cast_diff: parameters")
        for piece, master in zip(layout.pieces, masters, strict=True):
            if (
                piece.dtype != torch.bfloat16
                or master.dtype != torch.float32
                or master.numel() != piece.numel
            ):
                raise ValueError(
                    f"cast_diff: {piece.name} is {piece.dtype} of {piece.numel} elements, its master {master.dtype} "
                    f"of {master.numel()}; need bfloat16 and float32 of one size"
                )
            if not master.is_contiguous():
                raise ValueError(f"cast_diff: the master of {piece.name} is not contiguous")
        device = parameters[0].device if parameters else torch.device("cpu")
        self.layout = layout
        self.masters = [master.detach() for master in masters]
        self.parameters = [parameter.detach() for parameter in parameters]
        self.dirty = [
            torch.zeros(bit_words(piece.numel), dtype=torch.int32, device=device) for piece in layout.pieces
        ]
        """P bitmaps [⌈n/32⌉] int32; bit i % 32 of word i // 32 belongs to element i."""
        self._lanes = torch.zeros(2, dtype=torch.int64, device=device)
        self._changed = torch.zeros(1, dtype=torch.int64, device=device)

    def step(self) -> None:
        """One launch over all pieces, on the current stream."""
        table = self.layout.table_on(self._lanes.device)
        torch.ops.treadle.cast_diff_(
            table, self.masters, self.parameters, self.dirty, self._lanes, self._changed
        )

    def change(self) -> Partial:
        """What to combine with the digest that the parameters had at the last `clear`. Waits for the stream."""
        first, second = self._lanes.tolist()
        return Partial(first % (1 << 64), second % (1 << 64))

    def changes(self) -> int:
        """Changed elements, counted per step: one that changes in two steps counts twice. Waits for the stream."""
        return int(self._changed)

    def clear(self) -> None:
        """Forgets all changes: the parameters are published."""
        for bitmap in (*self.dirty, self._lanes, self._changed):
            bitmap.zero_()


@op(
    "cast_diff_(Tensor table, Tensor[] masters, Tensor(a!)[] parameters, Tensor(b!)[] dirty, Tensor(c!) lanes, "
    "Tensor(d!) changed) -> ()",
    fake=writes_only,
)
def _cast_diff(
    table: Tensor,
    masters: Sequence[Tensor],
    parameters: Sequence[Tensor],
    dirty: Sequence[Tensor],
    lanes: Tensor,
    changed: Tensor,
) -> None:
    """`table` [P, 6] int64 of a layout; `lanes` [2] and `changed` [1] int64 are added to."""
    if not masters:
        return
    if library := native.library(lanes.device):
        at = addresses(lanes.device, masters, parameters, dirty)
        blocks = sum(-(-master.numel() // 65536) for master in masters)
        library.call("cast_diff", table, at, len(masters), blocks, lanes, changed, device=lanes.device)
    else:
        cast_diff_eager(table, masters, parameters, dirty, lanes, changed)


def cast_diff_eager(
    table: Tensor,
    masters: Sequence[Tensor],
    parameters: Sequence[Tensor],
    dirty: Sequence[Tensor],
    lanes: Tensor,
    changed: Tensor,
) -> None:
    """The twin in torch operations."""
    rows = table.tolist()
    for row, master, parameter, bitmap in zip(rows, masters, parameters, dirty, strict=True):
        old, new = parameter.reshape(-1).view(torch.int16), bf16_bits(master.reshape(-1))
        differs = old != new
        index = differs.nonzero().squeeze(-1)
        bitmap.bitwise_or_(packed_bits(differs))
        changed += index.numel()
        at = index + row[5]
        lanes += lanes_at(at, new[index], row[3], row[4]) - lanes_at(at, old[index], row[3], row[4])
        old.copy_(new)


def bf16_bits(values: Tensor) -> Tensor:
    """[n] int16: fp32 `values` [n] rounded to bf16, nearest, ties to even. Unlike in `Tensor.to`, a NaN keeps its
    sign and upper payload whatever the processor and the tensor's length."""
    bits = values.detach().view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return torch.where(values.isnan(), quiet, rounded).to(torch.int16)


def packed_bits(mask: Tensor) -> Tensor:
    """[⌈n/32⌉] int32: the bits of `mask` [n] bool."""
    words = torch.zeros(bit_words(mask.numel()) * 32, dtype=torch.int64, device=mask.device)
    words[: mask.numel()] = mask
    shifts = torch.arange(32, device=mask.device)
    return (words.view(-1, 32) << shifts).sum(-1).to(torch.int32)


def unpacked_bits(words: Tensor, numel: int) -> Tensor:
    """[numel] bool: the inverse of `packed_bits`."""
    shifts = torch.arange(32, device=words.device)
    return ((words.view(-1, 1) >> shifts) & 1).reshape(-1)[:numel].bool()


def signed_lanes(partial: Partial) -> list[int]:
    """As torch's int64 holds them."""
    return [signed(partial.first), signed(partial.second)]
