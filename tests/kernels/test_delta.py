"""Deltas: what is encoded is what is applied, and every compiled way agrees with the twin to the byte."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.weights import DTYPES, changed, generator, misaligned, random_bits, same_bits
from torch import Tensor

from treadle.kernels import delta_codec as codec
from treadle.kernels import native
from treadle.kernels.cast_diff import packed_bits
from treadle.kernels.delta import Delta, apply_delta_, check_delta, encode_delta
from treadle.kernels.delta_codec import BITMAP, DENSE, EMPTY, GAP, GAP_STEP, INDEX, RICE
from treadle.kernels.digest import Partial, combine, partial_digest_eager
from treadle.kernels.layout import INTEGERS, Layout
from treadle.kernels.plan import Plan

SIZES = (65536 * 2 + 777, 0, 1, 33, 65536, 8192, 9001)


def digest_of(layout: Layout, tensors: list[Tensor]) -> Partial:
    pairs = zip(layout.pieces, tensors, strict=True)
    return combine(partial_digest_eager(piece.name, piece.flat_offset, tensor) for piece, tensor in pairs)


@cache  # nobody writes into them, and every backend gets the same
def update(
    dtype: torch.dtype, density: float, seed: int, ulps: int = 0
) -> tuple[Layout, list[Tensor], list[Tensor]]:
    old = [misaligned(random_bits(n, dtype, seed + i), i % 3) for i, n in enumerate(SIZES)]
    masks = [torch.rand(len(t), generator=generator(seed + i)) < density for i, t in enumerate(old)]
    new = [changed(t, mask, seed, ulps=ulps) for t, mask in zip(old, masks, strict=True)]
    return Layout.of((f"w{i}", t) for i, t in enumerate(old)), old, new


def encoded(layout: Layout, old: list[Tensor], new: list[Tensor], *, mode: str) -> Delta:
    digests = {"base": digest_of(layout, old), "digest": digest_of(layout, new)}
    if mode == "dirty":
        bits = INTEGERS[old[0].element_size()]
        dirty = [packed_bits(a.view(bits) != b.view(bits)) for a, b in zip(old, new, strict=True)]
        return encode_delta(layout, new, dirty=dirty, **digests)
    return encode_delta(layout, new, before=old, steps=mode == "steps", **digests)


@cache
def by_the_twin(dtype: torch.dtype, density: float, seed: int, ulps: int, mode: str) -> Delta:
    """The update as the eager twin encodes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda device: None)
        return encoded(*update(dtype, density, seed, ulps), mode=mode)


def applied(delta: Delta, old: list[Tensor]) -> list[Tensor]:
    targets = [misaligned(t, 1) for t in old]
    plan = Plan.direct(delta.layout, [(p.name, t) for p, t in zip(delta.layout.pieces, targets, strict=True)])
    apply_delta_(delta, plan)
    return targets


def encodings(delta: Delta) -> set[int]:
    return set((delta.blocks.numpy().view(np.uint32) >> 28).tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["steps", "values", "dirty"])
def test_an_applied_delta_gives_the_new_weights_bit_for_bit(
    backend: native.Library, dtype: torch.dtype, mode: str
) -> None:
    for density, ulps in ((0, 0), (1e-4, 0), (0.03, 2), (0.3, 40), (1, 0)):
        layout, old, new = update(dtype, density, 11, ulps)
        delta = encoded(layout, old, new, mode=mode)
        delta = Delta.from_bytes(layout, delta.to_bytes())
        assert all(same_bits(a, b) for a, b in zip(applied(delta, old), new, strict=True))
        assert delta.payload.numel() <= layout.dense_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("mode", ["steps", "values", "dirty"])
def test_compiled_encoders_write_the_bytes_that_the_twin_writes(
    backend: native.Library, dtype: torch.dtype, mode: str
) -> None:
    for density, ulps in (
        (1e-4, 0),
        (0.004, 1),
        (0.02, 2),
        (0.11, 9),
        (0.2, 9),
        (0.4, 300 if dtype.itemsize > 1 else 3),
        (1, 1),
    ):
        layout, old, new = update(dtype, density, 23, ulps)
        delta = encoded(layout, old, new, mode=mode)
        twin = by_the_twin(dtype, density, 23, ulps, mode)
        assert torch.equal(delta.blocks, twin.blocks)
        assert torch.equal(delta.payload, twin.payload)
        assert delta.elements == twin.elements


def test_every_encoding_is_the_smallest_somewhere(backend: native.Library) -> None:
    """One block each; the expected one follows from the sizes in csrc/codec.h."""
    n = 65536
    old = torch.zeros(n, dtype=torch.bfloat16).view(torch.int16) + 0x3C00
    every = torch.arange(n)
    cases = {
        EMPTY: (every < 0, 1),
        DENSE: (every >= 0, 0),
        BITMAP: (torch.rand(n, generator=generator(1)) < 0.5, 0),
        INDEX: (every % 6000 == 17, 0),
        GAP: (torch.rand(n, generator=generator(2)) < 0.03, 0),
        GAP_STEP: ((every == 10) | (every == 200), 7),
        RICE: (torch.rand(n, generator=generator(3)) < 0.03, 1),
    }
    for encoding, (where, ulps) in cases.items():
        new = changed(old.view(torch.bfloat16), where, 9, ulps=ulps)
        layout, mode = Layout.of([("w", new)]), "steps" if encoding in (GAP_STEP, RICE) else "values"
        delta = encoded(layout, [old.view(torch.bfloat16)], [new], mode=mode)
        assert encodings(delta) == {encoding}
        assert same_bits(applied(delta, [old.view(torch.bfloat16)])[0], new)


@given(
    positions=st.sets(st.integers(0, 70_000), max_size=40),
    runs=st.lists(st.tuples(st.integers(0, 69_000), st.integers(1, 700)), max_size=3),
    seed=st.integers(0, 1000),
    width=st.sampled_from([torch.float8_e4m3fn, torch.bfloat16, torch.float32]),
    mode=st.sampled_from(["steps", "values", "dirty"]),
)
@settings(max_examples=60, deadline=None)
def test_any_pattern_of_changes_survives_and_the_twin_agrees(
    positions: set[int], runs: list[tuple[int, int]], seed: int, width: torch.dtype, mode: str
) -> None:
    n = 70_001
    where = torch.zeros(n, dtype=torch.bool)
    where[sorted(positions)] = True
    for start, length in runs:
        where[start : start + length] = True
    old = random_bits(n, width, seed)
    new = changed(old, where, seed + 1, ulps=seed % 4)
    layout = Layout.of([("w", old)])
    delta = encoded(layout, [old], [new], mode=mode)
    assert same_bits(applied(delta, [old])[0], new)
    assert delta.blocks.numel() == 2
    at = 0
    for b, entry in enumerate(delta.blocks.tolist()):
        size, start = entry & ((1 << 28) - 1), b * 65536
        data = delta.payload[at : at + size].numpy().tobytes()
        changes = codec.decode_block((entry & 0xFFFFFFFF) >> 28, data, min(65536, n - start), width.itemsize)
        assert set(where[start:].nonzero().squeeze(-1)[: len(changes.positions)].tolist()) <= set(
            changes.positions.tolist()
        )
        at += size


@pytest.mark.parametrize("gap", [254, 255, 256, 510, 511, 8191, 8192, 65535])
def test_distances_at_the_limits_of_a_byte_a_segment_and_a_block(backend: native.Library, gap: int) -> None:
    old = torch.zeros(2 * 65536, dtype=torch.bfloat16)
    new = old.clone()
    new[torch.tensor([0, gap, len(old) - 1])] = 1.0
    layout = Layout.of([("w", old)])
    for mode in ("steps", "values"):
        assert same_bits(applied(encoded(layout, [old], [new], mode=mode), [old])[0], new)


def test_threads_do_not_change_a_delta(cpu_library: object, threads: int) -> None:
    layout, old, new = update(torch.bfloat16, 0.02, 31, 2)
    torch.set_num_threads(threads)
    delta = encoded(layout, old, new, mode="steps")
    torch.set_num_threads(1)
    alone = encoded(layout, old, new, mode="steps")
    assert torch.equal(delta.payload, alone.payload)
    torch.set_num_threads(threads)
    assert all(same_bits(a, b) for a, b in zip(applied(delta, old), new, strict=True))


def test_a_payload_need_not_hold_the_dense_weights_and_one_too_small_is_told(
    backend: native.Library, threads: int
) -> None:
    layout, old, new = update(torch.bfloat16, 0.02, 37, 2)
    delta = encoded(layout, old, new, mode="steps")
    for missing in (0, 1):
        blocks, total = torch.zeros_like(delta.blocks), torch.zeros(2, dtype=torch.int64)
        payload = torch.full((delta.payload.numel() - missing,), 0xA5, dtype=torch.uint8)
        torch.ops.treadle.delta_encode(layout.table, new, old, [], True, blocks, payload, total)
        assert total.tolist() == [delta.payload.numel(), delta.elements]
        assert torch.equal(blocks, delta.blocks)
        assert missing or torch.equal(payload, delta.payload)


def test_a_bitmap_that_marks_too_much_is_harmless(backend: native.Library) -> None:
    old = random_bits(100_001, torch.bfloat16, 3)
    new = changed(old, torch.arange(100_001) % 97 == 0, 4)
    layout = Layout.of([("w", old)])
    dirty = packed_bits(torch.arange(100_001) % 97 < 3)
    dirty[-1] |= -(2**31)  # beyond the last element
    base, digest = digest_of(layout, [old]), digest_of(layout, [new])
    delta = encode_delta(layout, [new], dirty=[dirty], base=base, digest=digest)
    assert same_bits(applied(delta, [old])[0], new)
    targets = applied(delta, [old])
    plan = Plan.direct(layout, [("w", targets[0])])
    apply_delta_(delta, plan, expected=Partial(0, 0))
    assert same_bits(targets[0], new), "values may be applied twice"


def entropy_bound_bytes(old: Tensor, new: Tensor) -> float:
    """Independent positions, and independent steps of the measured frequencies."""
    moves = codec.ulp_steps(
        old.view(torch.int16).numpy().view(np.uint16), new.view(torch.int16).numpy().view(np.uint16)
    )
    moves = moves[moves != 0]
    p = len(moves) / len(old)
    share = np.unique(moves, return_counts=True)[1] / len(moves)
    bits = -p * math.log2(p) - (1 - p) * math.log2(1 - p) - p * float(share @ np.log2(share))
    return len(old) * bits / 8


def adam_like(n: int, density: float) -> tuple[Tensor, Tensor]:
    """Weights N(0, 0.02²) and a step of Adam at the learning rate that changes `density` of their bf16."""
    g = generator(17)
    master, direction = torch.randn(n, generator=g) * 0.02, torch.randn(n, generator=g).clamp(-3, 3) / 3
    low, high = 1e-8, 1e-3
    for _ in range(30):
        rate = math.sqrt(low * high)
        new = (master - rate * direction).bfloat16()
        below = float((new != master.bfloat16()).float().mean()) < density
        low, high = (rate, high) if below else (low, rate)
    return master.bfloat16(), new


@pytest.mark.parametrize(("density", "times_smaller"), [(0.017, 70), (0.04, 35), (0.11, 16), (0.24, 9)])
def test_deltas_of_adam_like_updates_are_near_the_entropy_bound(density: float, times_smaller: float) -> None:
    old, new = adam_like(1_000_000, density)
    layout = Layout.of([("w", old)])
    delta = encode_delta(layout, [new], before=[old], base=Partial(0, 0), digest=Partial(0, 0))
    assert delta.density == pytest.approx(density, rel=0.03)
    assert 2 * len(old) / delta.nbytes > times_smaller
    assert delta.nbytes < 1.25 * entropy_bound_bytes(old, new)


def test_a_model_that_did_not_change_costs_four_bytes_per_block() -> None:
    layout, old, _ = update(torch.bfloat16, 0, 1)
    delta = encoded(layout, old, old, mode="steps")
    assert delta.payload.numel() == 0
    assert delta.nbytes == 84 + 4 * layout.blocks
    assert check_delta(delta, Plan(layout)) == Partial(0, 0)


def test_tensors_that_are_not_the_layouts_are_refused() -> None:
    layout, old, _ = update(torch.bfloat16, 0, 1)
    none = {"base": Partial(0, 0), "digest": Partial(0, 0)}
    with pytest.raises(ValueError, match="either before= or dirty="):
        encode_delta(layout, old, **none)
    with pytest.raises(ValueError, match="6 tensors for a layout of 7"):
        encode_delta(layout, old, before=old[1:], **none)
    with pytest.raises(ValueError, match=r"w0 is torch\.float32"):
        encode_delta(layout, [old[0].float(), *old[1:]], before=old, **none)
    with pytest.raises(ValueError, match="bitmap of w0 must be int32"):
        encode_delta(layout, old, dirty=[torch.zeros(1)] * 7, **none)
