"""The encodings of a delta in numpy and Python integers: the twin of the compiled encoders and decoders.

csrc/codec.h describes the encodings; here they are written a second time, from that description, and serve as the
oracle of the compiled ones and as the slow way where no library loads. One block at a time; n ≤ 65,536 elements of
w bytes, m of them changed. Elements are unsigned integers of their width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 65536
SEGMENT = 8192
EMPTY, DENSE, BITMAP, INDEX, GAP, GAP_STEP, RICE = range(7)
CORRUPT, OUTSIDE, MISMATCH = 1, 2, 3
RICE_LIMIT = 16
DISTANCE_BITS = 13

Bits = NDArray[Any]
Integers = NDArray[np.int64]


class Changes(NamedTuple):
    """m changes in order of position: a value or, where `is_step`, a number of ulps to add."""

    positions: Integers
    is_step: NDArray[np.bool_]
    values: Integers


class Damage(Exception):  # noqa: N818  names what it found, never leaves this package
    """A block that no encoder writes; `found` is CORRUPT or OUTSIDE."""

    def __init__(self, found: int) -> None:
        super().__init__(found)
        self.found = found


def ordered(bits: Bits) -> Integers:
    """Bit patterns in the order of the values they stand for: -0 before 0, one ulp is 1."""
    sign = 1 << (8 * bits.itemsize - 1)
    wide = bits.astype(np.int64)
    return np.where(wide & sign, ~(wide & (sign - 1)), wide)


def ulp_steps(before: Bits, now: Bits) -> Integers:
    return _wrapped(ordered(now) - ordered(before), before.itemsize)


def ulp_add(before: Bits, steps: Integers) -> Bits:
    width = before.itemsize
    sign = 1 << (8 * width - 1)
    moved = _wrapped(ordered(before) + steps, width)
    return np.where(moved < 0, sign | (~moved & (sign - 1)), moved).astype(before.dtype)


def _wrapped(numbers: Integers, width: int) -> Integers:
    half = 1 << (8 * width - 1)
    return (numbers + half) % (2 * half) - half


def bit_length(numbers: Integers) -> Integers:
    return np.frexp(numbers.astype(np.float64))[1].astype(np.int64)


def rice_bits(numbers: Integers, k: int, raw: int) -> Integers:
    """Length of each number's code."""
    q = numbers >> k
    return np.where(q < RICE_LIMIT, q + 1 + k, RICE_LIMIT + raw)


def rice_codes(numbers: Integers, k: int) -> NDArray[np.uint64]:
    q = np.minimum(numbers >> k, RICE_LIMIT)
    short = (numbers & ((1 << k) - 1)) << (q + 1) | ((1 << q) - 1)
    long = numbers << RICE_LIMIT | ((1 << RICE_LIMIT) - 1)
    return np.where(q < RICE_LIMIT, short, long).astype(np.uint64)


def rice_parameter(numbers: Integers, raw: int) -> int:
    """The parameter that is best for the middles of the numbers' classes by length."""
    histogram = np.bincount(bit_length(numbers), minlength=raw + 1)
    classes = np.array([b if b < 2 else 3 << (b - 2) for b in range(raw + 1)])
    return int(np.argmin([int(histogram @ rice_bits(classes, k, raw)) for k in range(raw)]))


def encode_block(
    now: Bits, before: Bits | None, changed: NDArray[np.bool_], steps: bool
) -> tuple[int, bytes]:
    """The smallest encoding and its bytes. now, before [n]; changed [n]."""
    positions = np.flatnonzero(changed)
    if not len(positions):
        return EMPTY, b""
    values = now[positions].tobytes()
    gaps, count = _gaps(positions), int(len(positions) - 1).to_bytes(2, "little")
    candidates = [
        (DENSE, now.tobytes()),
        (BITMAP, np.packbits(changed, bitorder="little").tobytes() + values),
        (INDEX, positions.astype("<u2").tobytes() + values),
        (GAP, count + values + gaps),
    ]
    if steps and before is not None:
        moves = ulp_steps(before[positions], now[positions])
        candidates.append((GAP_STEP, count + _nibbles(moves, now[positions]) + gaps))
        if (rice := _rice(positions, moves, len(now), now.itemsize)) is not None:
            candidates.append((RICE, rice))
    return min(candidates, key=lambda candidate: len(candidate[1]))


def _gaps(positions: Integers) -> bytes:
    gap = np.diff(positions, prepend=-1) - 1
    parts = np.column_stack([np.full_like(gap, 255), gap % 255]).reshape(-1)
    return (
        np.repeat(parts, np.column_stack([gap // 255, np.ones_like(gap)]).reshape(-1)).astype("u1").tobytes()
    )


def _nibbles(moves: Integers, values: Bits) -> bytes:
    fits = (moves >= -8) & (moves <= 7)
    nibbles = np.zeros(len(moves) + len(moves) % 2, dtype=np.uint8)
    nibbles[: len(moves)] = np.where(fits, moves & 15, 0)
    return (nibbles[::2] | nibbles[1::2] << 4).tobytes() + values[~fits].tobytes()


def _rice(positions: Integers, moves: Integers, n: int, width: int) -> bytes | None:
    segment = positions // SEGMENT
    starts = np.where(np.diff(segment, prepend=-1) > 0, segment * SEGMENT, np.roll(positions, 1) + 1)
    distances, sizes = positions - starts, np.abs(moves) - 1
    k, j = rice_parameter(distances, DISTANCE_BITS), rice_parameter(sizes, 8 * width)
    streams = []
    for s in range(-(-n // SEGMENT)):
        at = slice(*np.searchsorted(segment, [s, s + 1]))
        streams.append(_stream(distances[at], sizes[at], moves[at] < 0, k, j, width))
    if any(len(stream) > 65535 for stream in streams):
        return None
    lengths = b"".join(len(stream).to_bytes(2, "little") for stream in streams)
    return bytes([k, j]) + lengths + b"".join(streams)


def _stream(
    distances: Integers, sizes: Integers, negative: NDArray[np.bool_], k: int, j: int, width: int
) -> bytes:
    step_bits = rice_bits(sizes, j, 8 * width)
    signs = negative.astype(np.uint64) << step_bits.astype(np.uint64)
    codes = np.column_stack([rice_codes(distances, k), rice_codes(sizes, j) | signs]).reshape(-1)
    lengths = np.column_stack([rice_bits(distances, k, DISTANCE_BITS), step_bits + 1]).reshape(-1)
    total = int(lengths.sum())
    within = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    bits = (np.repeat(codes, lengths) >> within.astype(np.uint64) & np.uint64(1)).astype(np.uint8)
    return np.packbits(np.append(bits, np.ones(-total % 8, dtype=np.uint8)), bitorder="little").tobytes()


def decode_block(encoding: int, data: bytes, n: int, width: int) -> Changes:
    """The changes of a block. Raises `Damage`."""
    if encoding == EMPTY:
        _demand(not data)
        return Changes(np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0, np.int64))
    if encoding == RICE:
        return _read_rice(data, n, width)
    if encoding in (GAP, GAP_STEP):
        return _read_gap(data, n, width, steps=encoding == GAP_STEP)
    if encoding == DENSE:
        _demand(len(data) == n * width)
        positions, values = np.arange(n), data
    elif encoding == BITMAP:
        head = -(-n // 8)
        _demand(len(data) >= head)
        positions = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8, head), bitorder="little"))
        values = data[head:]
        _demand(len(values) == len(positions) * width)
        _demand(not len(positions) or int(positions[-1]) < n, OUTSIDE)
    else:
        _demand(encoding == INDEX and len(data) % (2 + width) == 0)
        count = len(data) // (2 + width)
        positions, values = np.frombuffer(data, "<u2", count).astype(np.int64), data[2 * count :]
        _check_ascending(positions, n)
    return Changes(positions, np.zeros(len(positions), bool), _integers(values, width))


def _check_ascending(positions: Integers, n: int) -> None:
    """Whichever comes first: a position outside, or one that does not follow its predecessor."""
    outside, backward = positions >= n, np.diff(positions, prepend=-1) <= 0
    if (bad := outside | backward).any():
        raise Damage(OUTSIDE if outside[int(np.argmax(bad))] else CORRUPT)


def _read_gap(data: bytes, n: int, width: int, *, steps: bool) -> Changes:
    _demand(len(data) >= 2)
    count = int.from_bytes(data[:2], "little") + 1
    values = np.zeros(count, np.int64)
    is_step = np.zeros(count, bool)
    at = 2
    if steps:
        at += (count + 1) // 2
        _demand(len(data) >= at)
        packed = np.frombuffer(data, np.uint8, (count + 1) // 2, offset=2)
        nibbles = np.column_stack([packed & 15, packed >> 4]).reshape(-1)[:count].astype(np.int64)
        is_step = nibbles != 0
        values = np.where(nibbles > 7, nibbles - 16, nibbles)
    in_full = int((~is_step).sum())
    _demand(len(data) >= at + in_full * width)
    values[~is_step] = _integers(data[at : at + in_full * width], width)
    return Changes(_read_gaps(data[at + in_full * width :], count, n), is_step, values)


def _read_gaps(data: bytes, count: int, n: int) -> Integers:
    gaps = np.frombuffer(data, np.uint8).astype(np.int64)
    reached = np.cumsum(np.where(gaps == 255, 255, gaps + 1))
    ends = np.flatnonzero(gaps != 255)[:count]
    positions = reached[ends] - 1
    _demand(not (positions >= n).any(), OUTSIDE)
    _demand(len(ends) == count and (len(gaps) == 0 or ends[-1] == len(gaps) - 1))
    return positions


def _read_rice(data: bytes, n: int, width: int) -> Changes:
    streams = -(-n // SEGMENT)
    at = 2 + 2 * streams
    _demand(len(data) >= at and data[0] < DISTANCE_BITS and data[1] < 8 * width)
    positions: list[int] = []
    steps: list[int] = []
    for s in range(streams):
        size = int.from_bytes(data[2 + 2 * s : 4 + 2 * s], "little")
        _demand(size <= len(data) - at)
        length = min(SEGMENT, n - s * SEGMENT)
        for position, step in _read_stream(data[at : at + size], data[0], data[1], width, length):
            positions.append(s * SEGMENT + position)
            steps.append(step)
        at += size
    _demand(at == len(data))
    return Changes(np.array(positions, np.int64), np.ones(len(steps), bool), np.array(steps, np.int64))


def _read_stream(data: bytes, k: int, j: int, width: int, n: int) -> list[tuple[int, int]]:
    changes: list[tuple[int, int]] = []
    at, position = 0, -1
    while 8 * len(data) - at > 7 or _peek(data, at) != (1 << (8 * len(data) - at)) - 1:
        distance, at = _read_number(data, at, k, DISTANCE_BITS)
        position += distance + 1
        _demand(position < n)
        size, at = _read_number(data, at, j, 8 * width)
        _demand(at < 8 * len(data) and size < 1 << (8 * width - 1))
        changes.append((position, -(size + 1) if _peek(data, at) & 1 else size + 1))
        at += 1
    return changes


def _peek(data: bytes, at: int) -> int:
    """At least 57 bits from bit `at` on; zeros beyond the end."""
    return int.from_bytes(data[at >> 3 : (at >> 3) + 8], "little") >> (at & 7)


def _read_number(data: bytes, at: int, k: int, raw: int) -> tuple[int, int]:
    window = _peek(data, at)
    q = 0
    while q < RICE_LIMIT and window >> q & 1:
        q += 1
    end = at + (RICE_LIMIT + raw if q == RICE_LIMIT else q + 1 + k)
    _demand(end <= 8 * len(data))
    if q == RICE_LIMIT:
        return window >> RICE_LIMIT & ((1 << raw) - 1), end
    return q << k | (window >> (q + 1) & ((1 << k) - 1)), end


def _integers(data: bytes, width: int) -> Integers:
    return np.frombuffer(data, f"<u{width}").astype(np.int64)


def _demand(holds: Any, found: int = CORRUPT) -> None:
    if not holds:
        raise Damage(found)
