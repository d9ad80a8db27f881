"""The twins of the delta operators, over `delta_codec` and torch indexing. Arguments are those of `delta_ops`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from treadle.kernels import delta_codec as codec
from treadle.kernels.cast_diff import unpacked_bits
from treadle.kernels.digest import BLOCK
from treadle.kernels.digest import elements_digest_lanes_eager as lanes_at
from treadle.kernels.layout import INTEGERS

NONE = (1 << 63) - 1
"""verdict[0] while no defect is known, else 4·block + CORRUPT, OUTSIDE or MISMATCH of the first defective block."""

_BYTES = (1 << 28) - 1


def encode_eager(
    table: Tensor,
    current: Sequence[Tensor],
    before: Sequence[Tensor],
    dirty: Sequence[Tensor],
    steps: bool,
    blocks: Tensor,
    payload: Tensor,
    total: Tensor,
) -> None:
    entries, parts, elements = [], [], 0
    for p, (n, *_) in enumerate(table.tolist()):
        now = _numpy_bits(_flat(current[p]))
        old = _numpy_bits(_flat(before[p])) if before else None
        changed = unpacked_bits(dirty[p], n).cpu().numpy() if old is None else now != old
        for start in range(0, n, BLOCK):
            part = slice(start, min(n, start + BLOCK))
            was = None if old is None else old[part]
            encoding, data = codec.encode_block(now[part], was, changed[part], steps)
            entries.append(encoding << 28 | len(data))
            parts.append(data)
            elements += len(now[part]) if encoding == codec.DENSE else int(changed[part].sum())
    whole = b"".join(parts)
    blocks.copy_(torch.tensor(entries, dtype=torch.int32))
    total.copy_(torch.tensor([len(whole), elements]))
    if len(whole) <= payload.numel():
        payload[: len(whole)] = torch.from_numpy(np.frombuffer(whole, np.uint8).copy())


def check_eager(
    table: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    payload: Tensor,
    rectangles: Tensor,
    first: Tensor,
    destinations: Sequence[Tensor],
    lanes: Tensor,
    verdict: Tensor,
) -> None:
    for spot in _spots(table, blocks, offsets, payload, rectangles, first, destinations, verdict):
        if spot.counted:
            old = spot.target[spot.place]
            change = lanes_at(spot.flat, spot.after(old), spot.k1, spot.k2)
            lanes += change - lanes_at(spot.flat, old, spot.k1, spot.k2)


def apply_eager(
    table: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    payload: Tensor,
    rectangles: Tensor,
    first: Tensor,
    destinations: Sequence[Tensor],
    lanes: Tensor,
    expected: Tensor | None,
    verdict: Tensor,
) -> None:
    if int(verdict[0]) != NONE:
        return
    if expected is not None and not torch.equal(expected, lanes):
        verdict[0] = codec.MISMATCH
        return
    unheard = torch.zeros(2, dtype=torch.int64)
    for spot in _spots(table, blocks, offsets, payload, rectangles, first, destinations, unheard):
        spot.target[spot.place] = spot.after(spot.target[spot.place])


class _Spot(NamedTuple):
    """The m changes of one block that one rectangle holds."""

    target: Tensor
    """The destination's memory as integers."""
    place: Tensor
    """[m] int64, indices into it."""
    flat: Tensor
    """[m] int64, flat indices in the whole tensor, for the digest."""
    changes: codec.Changes
    counted: bool
    k1: int
    k2: int

    def after(self, old: Tensor) -> Tensor:
        """The new bits [m] of elements that hold `old` [m]."""
        bits = _numpy_bits(old)
        values = self.changes.values.astype(np.int64)
        moved = codec.ulp_add(bits, np.where(self.changes.is_step, values, 0))
        new = np.where(self.changes.is_step, moved, values.astype(bits.dtype))
        return torch.from_numpy(new).view(old.dtype).to(old.device)


def _spots(
    table: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    payload: Tensor,
    rectangles: Tensor,
    first: Tensor,
    destinations: Sequence[Tensor],
    verdict: Tensor,
) -> Iterator[_Spot]:
    """All changes in order. Notes the first defect and the number of elements in `verdict`."""
    data, rows, bounds = payload.cpu().numpy().tobytes(), rectangles.tolist(), first.tolist()
    entries, starts = [entry & 0xFFFFFFFF for entry in blocks.tolist()], [*offsets.tolist(), len(data)]
    block = 0
    for p, (n, width, _, k1, k2, flat_offset) in enumerate(table.tolist()):
        for start in range(0, n, BLOCK):
            entry, at, end = entries[block], starts[block], starts[block + 1]
            try:
                if at < 0 or end > len(data) or end - at != entry & _BYTES or (block == 0 and at):
                    raise codec.Damage(codec.CORRUPT)
                changes = codec.decode_block(entry >> 28, data[at:end], min(BLOCK, n - start), width)
            except codec.Damage as damage:
                verdict[0] = min(int(verdict[0]), 4 * block + damage.found)
                changes = codec.decode_block(codec.EMPTY, b"", 0, width)
            block += 1
            verdict[1] += len(changes.positions)
            element = changes.positions + start
            for row in rows[bounds[p] : bounds[p + 1]]:
                held, place = _within(row, element)
                target = _flat(destinations[row[4]])
                yield _Spot(
                    target,
                    torch.from_numpy(place).to(target.device),
                    torch.from_numpy(element[held] + flat_offset).to(target.device),
                    codec.Changes(changes.positions[held], changes.is_step[held], changes.values[held]),
                    bool(row[8]),
                    k1,
                    k2,
                )


def _within(row: list[int], element: codec.Integers) -> tuple[codec.Integers, codec.Integers]:
    """Which elements a rectangle holds, and where in the destination they live."""
    start, rows, cols, stride, _, offset, row_step, col_step, _ = row
    r, c = np.divmod(element - start, stride)
    held = np.flatnonzero((r >= 0) & (r < rows) & (c < cols))
    return held, offset + r[held] * row_step + c[held] * col_step


def _flat(tensor: Tensor) -> Tensor:
    """The memory from a tensor's first to its last element, as integers of their width."""
    bits = tensor.detach().view(INTEGERS[tensor.element_size()])
    extent = 1 + sum((size - 1) * step for size, step in zip(bits.shape, bits.stride(), strict=True))
    return bits.as_strided((extent if bits.numel() else 0,), (1,))


def _numpy_bits(bits: Tensor) -> codec.Bits:
    """Integers as numpy's unsigned ones."""
    array = bits.cpu().numpy()
    return array.view(f"u{array.itemsize}")
