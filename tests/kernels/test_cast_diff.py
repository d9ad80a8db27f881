"""The copy from masters to parameters that notices what it changes."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.weights import generator, misaligned, random_bits, same_bits
from torch import Tensor

from treadle.kernels import native
from treadle.kernels.cast_diff import CastDiff, bf16_bits, cast_diff_eager, packed_bits, unpacked_bits
from treadle.kernels.digest import combine, partial_digest_eager
from treadle.kernels.layout import Layout, Piece

SIZES = (1, 31, 32, 33, 8191, 65536 + 45, 0, 7)


def _layout() -> Layout:
    return Layout([Piece(f"w{i}", torch.bfloat16, n, 3 * i) for i, n in enumerate(SIZES)])


def _pairs(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Masters and parameters that agree in about two of three elements, misaligned in turns."""
    masters, parameters = [], []
    for i, n in enumerate(SIZES):
        master = random_bits(n, torch.float32, seed + i)
        parameter = bf16_bits(master).view(torch.bfloat16)
        other = random_bits(n, torch.bfloat16, seed + 100 + i)
        differs = torch.rand(n, generator=generator(seed)) < 0.3
        parameters.append(misaligned(torch.where(differs, other, parameter), i % 3))
        masters.append(misaligned(master, i % 2))
    return masters, parameters


def test_every_bit_pattern_is_rounded_as_the_twin_does(backend: native.Library) -> None:
    """All upper halves with lower halves around the tie; torch's own rounding where no NaN is."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32).repeat_interleave(6) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32).repeat(2**16)
    master = (high | low).view(torch.float32)
    cast = CastDiff(
        Layout.of([("w", master.to(torch.bfloat16))]), [master], [torch.zeros_like(master).bfloat16()]
    )
    cast.step()
    found = cast.parameters[0]
    assert torch.equal(found.view(torch.int16), bf16_bits(master))
    number = ~master.isnan()
    assert same_bits(found[number], master[number].to(torch.bfloat16))
    assert bool(found[~number].isnan().all())


def test_parameters_bitmaps_digests_and_counts_are_the_twins(backend: native.Library) -> None:
    layout = _layout()
    masters, parameters = _pairs(5)
    twins = [p.clone() for p in parameters]
    before = [p.clone() for p in parameters]
    cast = CastDiff(layout, masters, parameters)
    dirty, lanes, changed = (
        [torch.zeros_like(d) for d in cast.dirty],
        torch.zeros(2).long(),
        torch.zeros(1).long(),
    )
    cast_diff_eager(layout.table, masters, twins, dirty, lanes, changed)
    cast.step()
    assert all(same_bits(a, b) for a, b in zip(parameters, twins, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(cast.dirty, dirty, strict=True))
    assert cast.changes() == int(changed) > 10_000
    assert list(cast.change()) == [lane % 2**64 for lane in lanes.tolist()]

    def whole(tensors: list[Tensor]) -> object:
        return combine(
            partial_digest_eager(p.name, p.flat_offset, t)
            for p, t in zip(layout.pieces, tensors, strict=True)
        )

    old = combine(
        partial_digest_eager(p.name, p.flat_offset, t) for p, t in zip(layout.pieces, before, strict=True)
    )
    assert combine([old, cast.change()]) == whole(parameters)


def test_what_changes_and_changes_back_stays_marked_until_cleared(backend: native.Library) -> None:
    master = torch.ones(100)
    parameter = torch.ones(100, dtype=torch.bfloat16)
    cast = CastDiff(Layout.of([("w", parameter)]), [master], [parameter])
    cast.step()
    assert cast.changes() == 0
    for value in (2.0, 1.0):
        master[40] = value
        cast.step()
    marked = unpacked_bits(cast.dirty[0], 100)
    assert marked.nonzero().tolist() == [[40]]
    assert cast.changes() == 2
    assert cast.change() == (0, 0), "the parameters are what they were"
    cast.clear()
    assert not cast.dirty[0].any()


def test_the_bytes_around_parameters_and_bitmaps_are_left_alone(backend: native.Library) -> None:
    room = torch.full((70_003,), 7.0, dtype=torch.bfloat16)
    parameter = room[1:-1]
    master = torch.zeros(70_001)
    CastDiff(Layout.of([("w", parameter)]), [master], [parameter]).step()
    assert (float(room[0]), float(room[-1])) == (7.0, 7.0)
    assert not parameter.any()


def test_bitmaps_unpack_to_what_they_were_packed_from() -> None:
    for n in (0, 1, 31, 32, 33, 1000):
        mask = torch.rand(n, generator=generator(n)) < 0.5
        assert torch.equal(unpacked_bits(packed_bits(mask), n), mask)


def test_other_dtypes_and_sizes_are_refused() -> None:
    half, full = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4)
    with pytest.raises(ValueError, match="need bfloat16 and float32"):
        CastDiff(Layout.of([("w", full)]), [full], [full])
    with pytest.raises(ValueError, match="need bfloat16 and float32 of one size"):
        CastDiff(Layout.of([("w", half)]), [torch.zeros(5)], [half])
    with pytest.raises(ValueError, match="not contiguous"):
        CastDiff(Layout.of([("w", half)]), [torch.zeros(8)[::2]], [half])
    with pytest.raises(ValueError, match="no delta encoding"):
        Piece("w", torch.float64, 3)
