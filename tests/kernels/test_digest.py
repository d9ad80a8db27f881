"""The weight digest: what it must not depend on, and what it must notice."""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.kernels import digest
from treadle.kernels.digest import Partial, change, combine, elements_digest, partial_digest, state_digest

STORED = "7382390e9983124f132ce2fd09457d7b"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def _state(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(40, 16, generator=g),
        "layer.bias": torch.randn(7, generator=g),
        "norm": torch.ones(16),
        "half": torch.randn(33, generator=g).to(torch.bfloat16),
    }


def _plain(name: str, tensor: torch.Tensor) -> Partial:
    """The formula of the module's docstring, in Python integers."""
    word = (1 << 64) - 1
    raw = hashlib.blake2b(f"{tensor.dtype}\x1f{name}".encode(), digest_size=16).digest()
    k1, k2 = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")
    width = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[tensor.element_size()]
    bits = np.frombuffer(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), width)
    first = second = 0
    for i, b in enumerate(bits):
        x = (int(b) & word) ^ ((k1 + i * 0x9E3779B97F4A7C15) & word)
        x = x * 0xBF58476D1CE4E5B9 & word
        x ^= x >> 32
        h1 = x * 0x94D049BB133111EB & word
        h2 = (x + k2) * 0xD6E8FEB86659FD93 & word
        first, second = first + (h1 ^ h1 >> 29), second + (h2 ^ h2 >> 31)
    return Partial(first & word, second & word)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_vectorised_digest_equals_the_formula(dtype: torch.dtype) -> None:
    tensor = (torch.randn(257, generator=torch.Generator().manual_seed(1)) * 100).to(dtype)
    assert partial_digest("w", 0, tensor) == _plain("w", tensor)


def test_the_digest_has_not_changed_since_it_was_first_stored() -> None:
    state = {"a": torch.arange(5, dtype=torch.float32), "b": torch.zeros(3, dtype=torch.bfloat16)}
    assert state_digest(state.items()) == STORED


def test_chunk_boundaries_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    whole = partial_digest("w", 0, tensor)
    for size in (1, 7, 999, 1000, 1001):
        monkeypatch.setattr(digest, "_CHUNK", size)
        assert partial_digest("w", 0, tensor) == whole


def test_batches_leave_no_trace_and_no_more_than_one_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    state = _state()
    whole = state_digest(state.items())
    for size in (1, 64, 200, 10**9):
        monkeypatch.setattr(digest, "_BATCH_BYTES", size)
        assert state_digest(state.items()) == whole
    monkeypatch.setattr(digest, "_BATCH_BYTES", 2 * 4096)
    living: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def from_a_file() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(12):
            fresh = torch.full((1024,), float(i))
            living.add(fresh)
            assert len(living) <= 4
            yield str(i), fresh

    state_digest(from_a_file())


def test_a_state_is_looked_at_anew_every_time() -> None:
    """Tables of keys are remembered, bits are not."""
    weights = torch.nn.Linear(5, 3)
    first = state_digest(weights.state_dict(keep_vars=True).items())
    with torch.no_grad():
        weights.bias[1] += 1
    assert state_digest(weights.state_dict(keep_vars=True).items()) != first
    assert state_digest(weights.state_dict().items()) == str(
        combine(partial_digest(name, 0, tensor) for name, tensor in weights.state_dict().items())
    )
    with pytest.raises(TypeError, match="view_as_real"):
        state_digest([("w", torch.zeros(2, dtype=torch.complex64))])


def test_the_order_of_tensors_does_not_matter() -> None:
    state = list(_state().items())
    assert state_digest(state) == state_digest(reversed(state))


@given(cuts=st.lists(st.integers(0, 640), max_size=6), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_any_row_major_sharding_sums_to_the_whole(cuts: list[int], seed: int) -> None:
    tensor = _state(seed)["embed.weight"]
    bounds = [0, *sorted(cuts), tensor.numel()]
    flat = tensor.reshape(-1)
    shards = [partial_digest("w", a, flat[a:b]) for a, b in itertools.pairwise(bounds)]
    assert combine(reversed(shards)) == partial_digest("w", 0, tensor)


def test_column_shards_of_a_matrix_sum_to_the_whole() -> None:
    tensor = _state()["embed.weight"]
    index = torch.arange(tensor.numel()).reshape(tensor.shape)
    parts = [elements_digest("w", index[:, cols], tensor[:, cols]) for cols in (slice(0, 5), slice(5, 16))]
    assert combine(parts) == partial_digest("w", 0, tensor)


@given(chosen=st.sets(st.integers(0, 639), max_size=50))
@settings(max_examples=40, deadline=None)
def test_an_update_from_the_changed_elements_equals_recomputation(chosen: set[int]) -> None:
    old = _state()["embed.weight"]
    index = torch.tensor(sorted(chosen), dtype=torch.int64)
    new = old.clone()
    new.view(-1)[index] = torch.randn(len(chosen))
    delta = change("w", index, old.view(-1)[index], new.view(-1)[index])
    assert combine([partial_digest("w", 0, old), delta]) == partial_digest("w", 0, new)


def test_a_single_flipped_bit_changes_both_lanes() -> None:
    tensor = _state()["layer.bias"]
    before = partial_digest("w", 0, tensor)
    for element in range(tensor.numel()):
        for bit in range(32):
            damaged = tensor.clone()
            damaged.view(torch.int32)[element] ^= -(2**31) if bit == 31 else 1 << bit
            after = partial_digest("w", 0, damaged)
            assert before.first != after.first
            assert before.second != after.second


@pytest.mark.parametrize("bit", [0, 31, 62, 63])
def test_the_same_bit_flipped_everywhere_is_noticed(bit: int) -> None:
    tensor = torch.arange(64, dtype=torch.int64)
    mask = -(2**63) if bit == 63 else 1 << bit
    assert partial_digest("w", 0, tensor) != partial_digest("w", 0, tensor ^ mask)


def test_swapped_elements_and_swapped_tensors_are_noticed() -> None:
    a, b = torch.randn(32), torch.randn(32)
    swapped = a.clone()
    swapped[[3, 20]] = a[[20, 3]]
    assert state_digest([("a", a)]) != state_digest([("a", swapped)])
    assert state_digest([("a", a), ("b", b)]) != state_digest([("a", b), ("b", a)])


def test_name_dtype_sign_of_zero_and_missing_tensors_count() -> None:
    zeros = torch.zeros(4)
    digests = {
        state_digest([("a", zeros)]),
        state_digest([("b", zeros)]),
        state_digest([("a", -zeros)]),
        state_digest([("a", zeros.to(torch.int32))]),
        state_digest([("a", zeros[:3])]),
        state_digest([("a", zeros), ("b", zeros)]),
    }
    assert len(digests) == 6


def test_strides_do_not_matter_but_the_logical_order_does() -> None:
    tensor = torch.randn(6, 4)
    assert partial_digest("w", 0, tensor.t().contiguous().t()) == partial_digest("w", 0, tensor)
    assert partial_digest("w", 0, tensor.t()) != partial_digest("w", 0, tensor)


def test_random_states_do_not_collide_and_bits_are_balanced() -> None:
    seen = [int(state_digest([("w", torch.tensor([i], dtype=torch.int32))]), 16) for i in range(4000)]
    assert len(set(seen)) == len(seen)
    ones = np.array([[d >> k & 1 for k in range(128)] for d in seen]).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 0.05, "a digest bit hardly depends on the element"


def test_empty_tensors_and_empty_states_add_nothing() -> None:
    assert partial_digest("w", 0, torch.empty(0)) == Partial(0, 0)
    assert elements_digest("w", torch.empty(0, dtype=torch.int64), torch.empty(0)) == Partial(0, 0)
    assert state_digest([]) == "0" * 32


def test_complex_tensors_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(TypeError, match="view_as_real"):
        partial_digest("w", 0, torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="3 indices for 2 values"):
        elements_digest("w", torch.arange(3), torch.zeros(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_gives_the_same_digest() -> None:
    tensor = torch.randn(100_003)
    assert partial_digest("w", 3, tensor.cuda()) == partial_digest("w", 3, tensor)
