"""The compiled digest against its twin."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.weights import misaligned, random_bits

from treadle.kernels import digest, native
from treadle.kernels.digest import (
    combine,
    digest_pieces_eager,
    elements_digest,
    elements_digest_eager,
    partial_digest,
    partial_digest_eager,
    table_of,
    tensors_digest,
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


def mixed_state(seed: int) -> list[tuple[str, torch.Tensor]]:
    """Tensors of every width, around the boundaries of blocks and segments, at odd addresses, some empty."""
    sizes = (0, 1, 17, 8191, 8192, 8193, 65_535, 0, 65_536, 65_537, 140_001, 3, 0)
    return [
        (f"t{i}", misaligned(random_bits(size, DTYPES[(i + seed) % len(DTYPES)], seed + i), i % 5))
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("seed", range(len(DTYPES)))
def test_many_tensors_in_one_call_have_the_sum_of_their_digests(backend: native.Library, seed: int) -> None:
    state = mixed_state(seed)
    assert tensors_digest(state) == combine(partial_digest_eager(name, 0, t) for name, t in state)


@pytest.mark.parametrize("offset", [0, 3, 2**40 + 1])
def test_pieces_are_digested_where_they_belong_in_their_tensors(backend: native.Library, offset: int) -> None:
    state = mixed_state(1)
    table, blocks = table_of((name, t.dtype, t.numel(), offset) for name, t in state)
    tensors = [t for _, t in state]
    lanes = torch.ops.treadle.digest_pieces(table, tensors, blocks)
    assert lanes.tolist() == digest_pieces_eager(table, tensors).tolist()
    whole = combine(partial_digest_eager(name, offset, t) for name, t in state)
    assert [lane % 2**64 for lane in lanes.tolist()] == list(whole)


def test_threads_do_not_change_the_digest_of_many(cpu_library: object, threads: int) -> None:
    state = mixed_state(2)
    assert tensors_digest(state) == combine(partial_digest_eager(name, 0, t) for name, t in state)


def test_a_piece_of_no_known_width_is_refused(cpu_library: object) -> None:
    table, blocks = table_of([("w", torch.float32, 4, 0)])
    table[0, 1] = 3
    with pytest.raises(native.KernelError, match="treadle_digest_pieces: an argument is out of range"):
        torch.ops.treadle.digest_pieces(table, [torch.zeros(4)], blocks)


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
    assert tensors_digest([("w", tensor), ("none", tensor[:0])]) == whole
