"""Buckets: packed, checked and unpacked weights."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from treadle.actors.broadcast.buckets import ALIGNMENT_BYTES, check, pack, unpack
from treadle.kernels.digest import state_digest
from treadle.platform.errors import BroadcastError


def _state() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(40, 16, generator=g),
        "odd": torch.randn(3, generator=g).to(torch.bfloat16),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(8, 5, generator=g).t(),
        "fp8": torch.randn(9, generator=g).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
    }


@pytest.mark.parametrize("bucket_bytes", [1, 100, 2560, 1 << 20])
def test_what_is_packed_is_unpacked_bit_by_bit(bucket_bytes: int) -> None:
    state = _state()
    manifest, buckets = pack(state.items(), step=3, bucket_bytes=bucket_bytes)
    check(manifest, buckets)
    received = dict(unpack(manifest, buckets))
    assert list(received) == list(state)
    for name, tensor in state.items():
        assert received[name].dtype == tensor.dtype
        assert received[name].shape == tensor.shape
    assert manifest.version.step == 3
    assert manifest.version.digest == state_digest(received.items()) == state_digest(state.items())
    assert manifest.total_bytes == sum(len(bucket) for bucket in buckets)


def test_buckets_keep_their_limit_and_tensors_their_alignment() -> None:
    manifest, buckets = pack(((f"t{i}", torch.ones(i)) for i in range(1, 60)), step=0, bucket_bytes=512)
    assert len(buckets) > 5
    assert max(len(bucket) for bucket in buckets) <= 512
    assert all(entry.offset_bytes % ALIGNMENT_BYTES == 0 for entry in manifest.tensors)


def test_a_tensor_larger_than_a_bucket_gets_its_own() -> None:
    state = {"small": torch.ones(2), "large": torch.ones(1000), "next": torch.ones(2)}
    manifest, _ = pack(state.items(), step=0, bucket_bytes=64)
    assert [entry.bucket for entry in manifest.tensors] == [0, 1, 2]


def test_a_learner_may_reuse_the_memory_of_a_packed_tensor() -> None:
    def reused() -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.empty(4)
        for i in range(3):
            yield f"t{i}", buffer.fill_(i)

    manifest, buckets = pack(reused(), step=0, bucket_bytes=1 << 20)
    assert [t[0].item() for _, t in unpack(manifest, buckets)] == [0.0, 1.0, 2.0]


def test_the_same_state_packs_to_the_same_bytes() -> None:
    first, second = (pack(_state().items(), step=1, bucket_bytes=1000) for _ in range(2))
    assert first[0] == second[0]


def test_views_share_the_memory_of_a_read_only_bucket_without_a_warning() -> None:
    manifest, buckets = pack({"a": torch.ones(8)}.items(), step=0, bucket_bytes=1 << 20)
    buckets[0].flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((_, view),) = unpack(manifest, buckets)
    assert view.data_ptr() == buckets[0].ctypes.data


def test_one_flipped_bit_is_found_and_its_bucket_and_tensor_are_named() -> None:
    manifest, buckets = pack(_state().items(), step=5, bucket_bytes=100)
    damaged = buckets[1].copy()
    damaged[0] ^= 1
    with pytest.raises(BroadcastError, match=r"version 5: bucket 1 \(odd.*CRC-32"):
        check(manifest, [buckets[0], damaged, *buckets[2:]])


def test_a_truncated_and_a_missing_bucket_are_named() -> None:
    manifest, buckets = pack(_state().items(), step=5, bucket_bytes=100)
    with pytest.raises(BroadcastError, match=r"bucket 0 \(embed.weight\) has 2559 bytes instead of 2560"):
        check(manifest, [buckets[0][:-1], *buckets[1:]])
    with pytest.raises(BroadcastError, match=f"{len(buckets) - 1} of {len(buckets)} buckets"):
        check(manifest, buckets[:-1])
    with pytest.raises(BroadcastError, match=r"tensor embed.weight reaches beyond bucket 0"):
        list(unpack(manifest, [buckets[0][:-1], *buckets[1:]]))


def test_a_manifest_that_contradicts_its_buckets_is_refused() -> None:
    manifest, buckets = pack({"a": torch.ones(4)}.items(), step=0, bucket_bytes=64)
    wrong = dataclasses.replace(manifest.tensors[0], size_bytes=64)
    with pytest.raises(BroadcastError, match="tensor a reaches beyond"):
        list(unpack(dataclasses.replace(manifest, tensors=(wrong,)), buckets))


def test_repeated_names_empty_states_and_impossible_sizes_are_refused() -> None:
    one = ("a", torch.ones(1))
    with pytest.raises(BroadcastError, match="a occurs twice"):
        pack([one, one], step=0, bucket_bytes=64)
    with pytest.raises(BroadcastError, match="no tensors"):
        pack([], step=0, bucket_bytes=64)
    with pytest.raises(BroadcastError, match="bucket_bytes=0"):
        pack([one], step=0, bucket_bytes=0)


def test_a_model_of_demo_size_is_packed_and_checked_fast_enough() -> None:
    import time

    state = {f"t{i}": torch.randn(128, 128) for i in range(26)}
    best = {"pack": 1.0, "check": 1.0}
    for _ in range(7):
        start = time.thread_time()
        manifest, buckets = pack(state.items(), step=0, bucket_bytes=16 << 20)
        packed = time.thread_time()
        check(manifest, buckets)
        best["pack"] = min(best["pack"], packed - start)
        best["check"] = min(best["check"], time.thread_time() - packed)
    assert np.isclose(manifest.total_bytes, 1.7e6, rtol=0.01)
    assert best["pack"] < 0.1, best
    assert best["check"] < 0.02, best
