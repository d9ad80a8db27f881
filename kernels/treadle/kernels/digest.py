"""An additive, position-keyed digest of a model's weights.

For the element at flat index i of tensor t, with bit pattern b, and k₁, k₂ hashed from t's name and dtype:

    x  = b ⊕ (k₁ + i·φ)          φ odd, from the golden ratio
    x  = fold₃₂(x·M₁)            fold_s(x) = x ⊕ (x >> s)
    h₁ = fold₂₉(x·M₂),  h₂ = fold₃₁((x + k₂)·M₃)

and the digest is (Σ h₁, Σ h₂) mod 2⁶⁴ over all elements of all tensors. Addition commutes, hence it does not
depend on the order of tensors, nor on how they are sharded, and a change of n elements updates it in O(n).

What it detects: every step above is a bijection of b, so a single changed element always changes both lanes.
For several changed, swapped or shifted elements the differences of the two lanes behave like independent
uniform 64-bit numbers: an accident passes with a probability of about 2⁻¹²⁸. It is no cryptographic hash:
whoever can choose the weights can forge one. It guards against accidents, not adversaries. Bits are compared,
not values: 0.0 and -0.0 differ, as do two NaNs with different payloads.

Shapes: n elements of one tensor or shard, flattened in row-major order. The compiled libraries compute it where
they load (on CUDA: enqueued on the current stream, which reading the result waits for), `*_eager` elsewhere.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from treadle.kernels import native
from treadle.kernels.native import addresses
from treadle.kernels.registry import op

BLOCK = 65536  # elements; what a thread takes at a time
COLUMNS = 6  # of a table: elements, bytes per element, first block, k₁, k₂, flat offset
_PHI = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB
_M3 = 0xD6E8FEB86659FD93
_CHUNK = 1 << 15  # elements; four int64 buffers of this length stay in a core's L2 cache
_WORD = 1 << 64
_BATCH_BYTES = 1 << 28  # of tensors that are read from a file one by one, so many are in memory at a time

_VIEWS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Partial(NamedTuple):
    """The two lanes of a digest over some of the elements, each in [0, 2⁶⁴). `Partial(0, 0)`: none."""

    first: int
    second: int

    def __str__(self) -> str:
        return f"{self.first:016x}{self.second:016x}"

    @classmethod
    def parse(cls, text: str) -> Partial:
        """The inverse of `str`. Raises `ValueError` for anything but 32 hexadecimal digits."""
        if len(text) != 32:
            raise ValueError(f"digest {text!r}: expected 32 hexadecimal digits")
        return cls(int(text[:16], 16), int(text[16:], 16))


def state_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The digest of a whole state as 32 hexadecimal digits. Names must be unique: every tensor counts once.

    Example: `state_digest(model.state_dict().items())`. See `tensors_digest`.
    """
    return str(tensors_digest(tensors))


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> Partial:
    """The part of a state that consists of these whole tensors: what `partial_digest` of each adds up to, in one call
    for up to 256 MiB of them, so that a state of many small tensors costs no more than one of few large ones.

    Tensors may have any shape, stride and device, and any dtype but complex (`TypeError`). They are read after further
    ones were asked for: their memory may not be reused meanwhile."""
    lanes = [_together(batch) for batch in _batches(tensors)]
    return combine(_partial(pair) for pair in lanes)


def _batches(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Neighbours on one device."""
    batch: list[tuple[str, torch.Tensor]] = []
    device, size = None, 0
    for name, tensor in tensors:
        if size >= _BATCH_BYTES or tensor.device != device:
            if batch:
                yield batch
                batch.clear()  # whoever got it still refers to it
            device, size = tensor.device, 0
        batch.append((name, tensor))
        size += tensor.nbytes
    if batch:
        yield batch


def _together(named: Sequence[tuple[str, torch.Tensor]]) -> torch.Tensor:
    held = [t if t.is_contiguous() else t.detach().contiguous() for _, t in named]
    device = held[0].device
    key = tuple((name, t.dtype, t.numel(), 0) for (name, _), t in zip(named, held, strict=True))
    table, blocks = _table_on(key, device)
    with torch.no_grad():
        lanes: torch.Tensor = torch.ops.treadle.digest_pieces(table, held, blocks)
    return lanes


@functools.lru_cache(maxsize=16)  # a process has few states, and asks for their digests again and again
def _table_on(
    pieces: tuple[tuple[str, torch.dtype, int, int], ...], device: torch.device
) -> tuple[torch.Tensor, int]:
    table, blocks = table_of(pieces)
    return table.to(device), blocks


def table_of(pieces: Iterable[tuple[str, torch.dtype, int, int]]) -> tuple[torch.Tensor, int]:
    """The libraries' table [P, 6] int64 of pieces (name, dtype, elements, flat offset) and their number of blocks.
    Raises `TypeError` for complex dtypes."""
    rows, block = [], 0
    for name, dtype, numel, flat_offset in pieces:
        _check_dtype(dtype)
        k1, k2 = keys(name, dtype)
        rows.append((numel, dtype.itemsize, block, signed(k1), signed(k2), flat_offset))
        block += -(-numel // BLOCK)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, COLUMNS), block


def partial_digest(name: str, flat_offset: int, tensor: torch.Tensor) -> Partial:
    """The part of tensor `name` that `tensor` holds: n consecutive elements from flat index `flat_offset` on.

    `tensor` may have any shape, stride and device, and any dtype but complex (`TypeError`).
    """
    k1, k2 = keys(name, tensor.dtype)
    lanes = torch.ops.treadle.digest(_bits(tensor), flat_offset, signed(k1), signed(k2))
    return _partial(lanes)


def partial_digest_eager(name: str, flat_offset: int, tensor: torch.Tensor) -> Partial:
    """The twin of `partial_digest` in torch operations."""
    k1, k2 = keys(name, tensor.dtype)
    return _digest_eager(_bits(tensor), flat_offset, k1, k2)


def _digest_eager(bits: torch.Tensor, flat_offset: int, k1: int, k2: int) -> Partial:
    n = bits.numel()
    size = min(n, _CHUNK if bits.device.type == "cpu" else 1 << 24)
    ramp = torch.arange(size, dtype=torch.int64, device=bits.device).mul_(signed(_PHI))
    scratch = _Scratch(size, bits.device)
    first = second = 0
    for start in range(0, n, size or 1):
        part = bits[start : start + size]
        base = signed(k1 + (flat_offset + start) * _PHI)
        key = torch.add(ramp[: part.numel()], base, out=scratch.x[: part.numel()])
        a, b = _mix(part, key, k2, scratch)
        first, second = first + a, second + b
    return Partial(first % _WORD, second % _WORD)


def elements_digest(name: str, index: torch.Tensor, values: torch.Tensor) -> Partial:
    """The part of any n elements of tensor `name`: flat `index` [n] int64 in the whole tensor, `values` [n].

    For shards that are not consecutive, and for incremental updates. Raises `ValueError` for unequal lengths.
    """
    if index.numel() != values.numel():
        raise ValueError(f"digest of {name}: {index.numel()} indices for {values.numel()} values")
    k1, k2 = keys(name, values.dtype)
    flat = index.reshape(-1).to(values.device, torch.int64).contiguous()
    return _partial(torch.ops.treadle.digest_at(_bits(values), flat, signed(k1), signed(k2)))


def elements_digest_eager(name: str, index: torch.Tensor, values: torch.Tensor) -> Partial:
    """The twin of `elements_digest` in torch operations."""
    k1, k2 = keys(name, values.dtype)
    return _digest_at_eager(index.reshape(-1).to(torch.int64), _bits(values), k1, k2)


def _digest_at_eager(index: torch.Tensor, bits: torch.Tensor, k1: int, k2: int) -> Partial:
    if bits.numel() == 0:
        return Partial(0, 0)
    key = index.mul(signed(_PHI)).add_(signed(k1))
    first, second = _mix(bits, key, k2, _Scratch(key.numel(), key.device))
    return Partial(first % _WORD, second % _WORD)


def change(name: str, index: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> Partial:
    """What to combine with a digest when elements `index` [n] of tensor `name` go from `old` to `new` [n]."""
    before, after = elements_digest(name, index, old), elements_digest(name, index, new)
    return Partial((after.first - before.first) % _WORD, (after.second - before.second) % _WORD)


def combine(parts: Iterable[Partial]) -> Partial:
    """The digest of the union of disjoint parts, in any order."""
    first = second = 0
    for part in parts:
        first, second = first + part.first, second + part.second
    return Partial(first % _WORD, second % _WORD)


def _two_lanes(bits: torch.Tensor, *_: object) -> torch.Tensor:
    return bits.new_empty(2, dtype=torch.int64)


@op("digest(Tensor bits, int flat_offset, int k1, int k2) -> Tensor", fake=_two_lanes)
def _digest_op(bits: torch.Tensor, flat_offset: int, k1: int, k2: int) -> torch.Tensor:
    """Both lanes [2] int64 of `bits` [n], integers of 1, 2, 4 or 8 bytes, contiguous; keys as signed integers."""
    if library := native.library(bits.device):
        lanes = torch.zeros(2, dtype=torch.int64, device=bits.device)
        width = bits.element_size()
        library.call("digest", bits, bits.numel(), width, flat_offset, k1, k2, lanes, device=bits.device)
        return lanes
    return _lanes(_digest_eager(bits, flat_offset, k1, k2)).to(bits.device)


def _two_lanes_of_pieces(table: torch.Tensor, *_: object) -> torch.Tensor:
    return table.new_empty(2)


@op("digest_pieces(Tensor table, Tensor[] tensors, int blocks) -> Tensor", fake=_two_lanes_of_pieces)
def _digest_pieces_op(table: torch.Tensor, tensors: Sequence[torch.Tensor], blocks: int) -> torch.Tensor:
    """Both lanes [2] int64 of P contiguous `tensors`, added up; `table` [P, 6] int64 of `table_of`, on their device."""
    if library := native.library(table.device):
        lanes = torch.zeros(2, dtype=torch.int64, device=table.device)
        if blocks:
            at = addresses(table.device, tensors)
            library.call("digest_pieces", table, at, len(tensors), blocks, lanes, device=table.device)
        return lanes
    return digest_pieces_eager(table, tensors)


def digest_pieces_eager(table: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The twin in torch operations, tensor by tensor."""
    rows = zip(table.tolist(), tensors, strict=True)
    parts = (_digest_eager(_bits(tensor), row[5], row[3], row[4]) for row, tensor in rows)
    return _lanes(combine(parts)).to(table.device)


@op(
    "digest_at(Tensor bits, Tensor index, int k1, int k2) -> Tensor",
    fake=_two_lanes,
)
def _digest_at_op(bits: torch.Tensor, index: torch.Tensor, k1: int, k2: int) -> torch.Tensor:
    """Both lanes [2] int64 of `bits` [n] at flat `index` [n] int64, both contiguous."""
    if library := native.library(bits.device):
        lanes = torch.zeros(2, dtype=torch.int64, device=bits.device)
        width = bits.element_size()
        library.call("digest_at", index, bits, bits.numel(), width, k1, k2, lanes, device=bits.device)
        return lanes
    return elements_digest_lanes_eager(index, bits, k1, k2)


def elements_digest_lanes_eager(index: torch.Tensor, bits: torch.Tensor, k1: int, k2: int) -> torch.Tensor:
    """Both lanes [2] int64 of `bits` [n], integers, at flat `index` [n] int64, in torch operations."""
    return _lanes(_digest_at_eager(index, bits, k1, k2)).to(bits.device)


def _partial(lanes: torch.Tensor) -> Partial:
    first, second = lanes.tolist()
    return Partial(first % _WORD, second % _WORD)


def _lanes(partial: Partial) -> torch.Tensor:
    return torch.tensor([signed(partial.first), signed(partial.second)])


class _Scratch:
    """Reused buffers: allocation would cost as much as the arithmetic."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.x = torch.empty(size, dtype=torch.int64, device=device)
        self.y = torch.empty_like(self.x)
        self.t = torch.empty_like(self.x)


def _mix(bits: torch.Tensor, key: torch.Tensor, k2: int, scratch: _Scratch) -> tuple[int, int]:
    """Both lanes, summed over `bits` [n] with `key` [n] int64, which is overwritten."""
    n = bits.numel()
    y, t = scratch.y[:n], scratch.t[:n]
    x = key.bitwise_xor_(bits.to(torch.int64))
    _multiply_fold(x, _M1, 32, t)
    torch.add(x, signed(k2), out=y)
    _multiply_fold(x, _M2, 29, t)
    _multiply_fold(y, _M3, 31, t)
    return int(x.sum()), int(y.sum())


def _multiply_fold(x: torch.Tensor, factor: int, shift: int, t: torch.Tensor) -> None:
    """x ← fold(x·factor) in place. Torch shifts int64 arithmetically; the mask makes the shift logical,
    without which the fold would lose the top bit."""
    x.mul_(signed(factor))
    torch.bitwise_right_shift(x, shift, out=t)
    x.bitwise_xor_(t.bitwise_and_((1 << (64 - shift)) - 1))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns [n] as signed integers of the element's width."""
    _check_dtype(tensor.dtype)
    flat = tensor.detach().reshape(-1)
    return flat.contiguous().view(_VIEWS[flat.element_size()])


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype.is_complex:
        raise TypeError("digest: complex tensors are not supported; pass torch.view_as_real(tensor)")


def keys(name: str, dtype: torch.dtype) -> tuple[int, int]:
    """k₁ and k₂ of a tensor, each in [0, 2⁶⁴)."""
    raw = hashlib.blake2b(f"{dtype}\x1f{name}".encode(), digest_size=16).digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


def signed(value: int) -> int:
    """The value mod 2⁶⁴ as torch's signed int64."""
    value %= _WORD
    return value - _WORD if value >= _WORD >> 1 else value
