"""The sum of several tensors in fixed order."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.weights import generator, misaligned, random_bits, same_bits

from treadle.kernels import native
from treadle.kernels.reduce import KINDS, hierarchical_reduce, reduce_eager


@pytest.mark.parametrize("dtype", list(KINDS), ids=str)
@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("numel", [0, 1, 31, 2049, 70_001])
@pytest.mark.parametrize("wild", [True, False])
def test_sums_are_the_twins(
    backend: native.Library, dtype: torch.dtype, count: int, numel: int, wild: bool
) -> None:
    """Of every bit pattern, and of numbers whose sum depends on the order and on where it is rounded."""
    inputs = [
        misaligned(
            random_bits(numel, dtype, i) if wild else torch.randn(numel, generator=generator(i)).to(dtype),
            i % 3,
        )
        for i in range(count)
    ]
    assert same_bits(hierarchical_reduce(inputs), reduce_eager(inputs))


def test_every_half_survives_and_every_rounding_is_torchs(backend: native.Library) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        halves = every.view(dtype)
        halves = halves[~halves.isnan()]
        assert same_bits(hierarchical_reduce([halves]), halves)
        wide = torch.cat([halves.float(), halves.float() * 1.0009765625, halves.float() * 0.99951171875])
        parts = [wide.to(dtype), (wide - wide.to(dtype).float()).nan_to_num().to(dtype)]
        found, rounded = hierarchical_reduce(parts), (parts[0].float() + parts[1].float()).to(dtype)
        number = ~rounded.isnan()
        assert int(number.sum()) > 180_000
        assert same_bits(found[number], rounded[number])


def test_the_sum_is_rounded_once_and_may_replace_an_input(backend: native.Library) -> None:
    """1 + 256 · 2⁻⁹: added one by one in bf16 it would stay 1."""
    inputs = [torch.ones(100, dtype=torch.bfloat16), *[torch.full((100,), 2.0**-9).bfloat16()] * 256]
    out = hierarchical_reduce(inputs, out=inputs[0])
    assert out is inputs[0]
    assert out.tolist() == [1.5] * 100


def test_threads_do_not_change_a_sum(cpu_library: object, threads: int) -> None:
    inputs = [torch.randn(300_000, generator=generator(i)) for i in range(5)]
    assert same_bits(hierarchical_reduce(inputs), reduce_eager(inputs))


def test_tensors_that_are_not_alike_are_refused() -> None:
    with pytest.raises(ValueError, match="0 inputs"):
        hierarchical_reduce([])
    with pytest.raises(ValueError, match="of torch"):
        hierarchical_reduce([torch.zeros(3, dtype=torch.int32)])
    for other in (torch.zeros(4), torch.zeros(3).double(), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match="all must be alike"):
            hierarchical_reduce([torch.zeros(3), other])
    with pytest.raises(ValueError, match="not contiguous"):
        hierarchical_reduce([torch.zeros(6)[::2]])
