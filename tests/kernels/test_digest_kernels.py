"""The compiled digest against its twin."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.weights import misaligned, random_bits

from treadle.kernels import digest, native
from treadle.kernels.digest import (
    elements_digest,
    elements_digest_eager,
    partial_digest,
    partial_digest_eager,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.float8_e4m3fn,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 15, 16, 17, 4099])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_the_compiled_digest_is_the_twins(
    backend: native.Library, dtype: torch.dtype, numel: int, shift: int
) -> None:
    tensor = misaligned(random_bits(numel, dtype, 1), shift)
    assert partial_digest("w", 2**40 + 3, tensor) == partial_digest_eager("w", 2**40 + 3, tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_compiled_digest_of_scattered_elements_is_the_twins(
    backend: native.Library, dtype: torch.dtype
) -> None:
    values = random_bits(1001, dtype, 2)
    index = torch.randperm(2**20, generator=torch.Generator().manual_seed(3))[:1001] + 2**35
    assert elements_digest("w", index, values) == elements_digest_eager("w", index, values)


def test_threads_do_not_change_the_digest(cpu_library: object, threads: int) -> None:
    tensor = random_bits(300_001, torch.bfloat16, 4)
    assert partial_digest("w", 7, tensor) == partial_digest_eager("w", 7, tensor)


def test_without_a_library_the_twin_computes(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_bits(1000, torch.float32, 5)
    whole = partial_digest_eager("w", 0, tensor)
    for size in (1, 7, 999, 1001):
        monkeypatch.setattr(digest, "_CHUNK", size)
        assert partial_digest("w", 0, tensor) == whole
    index = torch.arange(1000)
    assert elements_digest("w", index, tensor) == whole
