"""Truncated, corrupt and hostile deltas: refused, with nothing written and nothing read out of range."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.kernels.test_delta import digest_of, encoded
from tests.kernels.weights import changed, generator, random_bits, same_bits
from torch import Tensor

from treadle.kernels import delta_codec as codec
from treadle.kernels import native
from treadle.kernels.delta import Delta, apply_delta_, check_delta, write_delta_
from treadle.kernels.digest import Partial
from treadle.kernels.errors import DeltaCorrupt, DeltaMismatch
from treadle.kernels.layout import Layout
from treadle.kernels.plan import Plan

ROOT = Path(__file__).parents[2]
BYTES = (1 << 28) - 1
N = 20_000


def block_of(
    encoding: int, data: bytes, n: int = N, dtype: torch.dtype = torch.bfloat16
) -> tuple[Delta, Tensor, Plan]:
    """A delta of one block that holds `data`, whatever it is, and the weights it is meant for."""
    weights = random_bits(n, dtype, 1)
    layout = Layout.of([("w", weights)])
    entry = np.array([encoding << 28 | len(data)], dtype=np.uint32).view(np.int32)
    delta = Delta(
        layout=layout,
        blocks=torch.from_numpy(entry),
        payload=torch.from_numpy(np.frombuffer(data, np.uint8).copy()),
        elements=0,
        base=Partial(0, 0),
        digest=Partial(0, 0),
    )
    return delta, weights, Plan.direct(layout, [("w", weights)])


def valid_blocks() -> dict[int, bytes]:
    """One block of every encoding but the empty one, made by the twin."""
    old = random_bits(N, torch.bfloat16, 1)
    found: dict[int, bytes] = {}
    cases = [(1.0, 0, False), (0.4, 0, False), (0.0005, 0, False), (0.05, 0, False), (0.05, 1, True)]
    for density, ulps, steps in cases:
        where = torch.rand(N, generator=generator(2)) < density
        new = changed(old, where, 3, ulps=ulps)
        bits = [t.view(torch.int16).numpy().view(np.uint16) for t in (new, old)]
        encoding, data = codec.encode_block(bits[0], bits[1], bits[0] != bits[1], steps)
        found[encoding] = data
    near = np.array([10, 40, 41, 200])
    found[codec.GAP_STEP] = (
        b"\x03\x00" + codec._nibbles(np.array([1, -8, 7, 30]), np.zeros(4, np.uint16)) + codec._gaps(near)
    )
    return found


VALID = valid_blocks()


def refused(delta: Delta, weights: Tensor, plan: Plan) -> bool:
    """Whether the check finds it damaged. Weights stay as they are whichever way it goes."""
    before = weights.clone()
    try:
        check_delta(delta, plan)
    except DeltaCorrupt:
        assert same_bits(weights, before)
        with pytest.raises(DeltaCorrupt):
            apply_delta_(delta, plan)
        assert same_bits(weights, before)
        return True
    return False


def test_the_examples_cover_every_encoding() -> None:
    assert set(VALID) == {codec.DENSE, codec.BITMAP, codec.INDEX, codec.GAP, codec.GAP_STEP, codec.RICE}


@pytest.mark.parametrize("encoding", sorted(VALID))
def test_every_truncation_and_every_surplus_byte_is_refused(backend: native.Library, encoding: int) -> None:
    data = VALID[encoding]
    assert not refused(*block_of(encoding, data))
    cuts = {0, 1, 2, 3, len(data) // 2, *range(max(0, len(data) - 40), len(data))}
    for cut in sorted(cuts - {len(data)}):
        if encoding == codec.INDEX and cut % 4 == 0:
            continue  # fewer changes, well-formed: the digest's matter
        assert refused(*block_of(encoding, data[:cut])), f"cut at {cut} of {len(data)}"
    for tail in (b"\x00", b"\xff", b"\x00" * 9):
        assert refused(*block_of(encoding, data + tail))


@pytest.mark.parametrize("encoding", sorted(VALID))
def test_flipped_bits_are_judged_as_the_twin_judges_them(backend: native.Library, encoding: int) -> None:
    """Some flips give another valid block; those the digest catches, see the next test."""
    rng = np.random.default_rng(encoding)
    outcomes = set()
    for _ in range(60):
        data = bytearray(VALID[encoding])
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        try:
            codec.decode_block(encoding, bytes(data), N, 2)
            expected = False
        except codec.Damage:
            expected = True
        assert refused(*block_of(encoding, bytes(data))) == expected
        outcomes.add(expected)
    assert outcomes == {False} if encoding == codec.DENSE else True in outcomes


@pytest.mark.parametrize("encoding", [0, *sorted(VALID), 7, 15])
def test_random_bytes_never_lead_outside(backend: native.Library, encoding: int) -> None:
    rng = np.random.default_rng(100 + encoding)
    for _ in range(40):
        n = int(rng.integers(1, 300))
        data = rng.integers(0, 256, int(rng.integers(1, 2 * n)), dtype=np.uint8).tobytes()
        delta, room, _ = block_of(encoding, data, n + 64)
        middle = room[32:-32]
        before = room.clone()
        plan = Plan.direct(Layout.of([("w", middle)]), [("w", middle)])
        delta = Delta(
            layout=plan.layout,
            blocks=delta.blocks,
            payload=delta.payload,
            elements=0,
            base=Partial(0, 0),
            digest=Partial(0, 0),
        )
        try:
            apply_delta_(delta, plan, expected=check_delta(delta, plan))
        except DeltaCorrupt:
            assert same_bits(room, before)
        assert same_bits(room[:32], before[:32])
        assert same_bits(room[-32:], before[-32:])


@pytest.mark.parametrize("encoding", sorted(VALID))
def test_writing_without_a_look_does_the_same_and_stays_within_its_tensor(
    backend: native.Library, encoding: int
) -> None:
    """Whole deltas are written alike; of damaged ones the first defect is told, and nothing outside changes."""
    rng = np.random.default_rng(encoding)
    for turn in range(12):
        data = bytearray(VALID[encoding])
        for _ in range(turn % 3):
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        delta, weights, _ = block_of(encoding, bytes(data[: len(data) - turn // 6]))
        room = torch.full((len(weights) + 128,), 7.0, dtype=weights.dtype)
        ours, theirs = room[64:-64].copy_(weights), weights.clone()
        told = []
        for target, write in ((ours, write_delta_), (theirs, checked_write)):
            try:
                write(delta, Plan.direct(delta.layout, [("w", target)]))
                told.append("")
            except DeltaCorrupt as error:
                told.append(str(error))
        assert told[0] == told[1]
        assert told[0] or same_bits(ours, theirs)
        assert bool((room[:64] == 7).all() and (room[-64:] == 7).all())


def checked_write(delta: Delta, plan: Plan) -> None:
    apply_delta_(delta, plan, expected=check_delta(delta, plan))


def test_damage_that_is_well_formed_is_caught_by_the_digest(backend: native.Library) -> None:
    old = random_bits(70_000, torch.bfloat16, 4)
    new = changed(old, torch.rand(70_000, generator=generator(5)) < 0.02, 6, ulps=2)
    layout = Layout.of([("w", old)])
    delta = encoded(layout, [old], [new], mode="values")
    rng = np.random.default_rng(7)
    for _ in range(30):
        target, payload = old.clone(), delta.payload.clone()
        payload[int(rng.integers(len(payload)))] ^= 1 << int(rng.integers(8))
        damaged = Delta(
            layout=layout,
            blocks=delta.blocks,
            payload=payload,
            elements=delta.elements,
            base=delta.base,
            digest=delta.digest,
        )
        with pytest.raises((DeltaCorrupt, DeltaMismatch)):
            apply_delta_(damaged, Plan.direct(layout, [("w", target)]))
        assert same_bits(target, old)


@pytest.mark.parametrize("sizes", [(1, -1), (-1, 1), (5, 5), (-40, 0)])
def test_a_table_that_does_not_fit_the_payload_is_refused(
    backend: native.Library, sizes: tuple[int, int]
) -> None:
    old = random_bits(2 * 65536, torch.bfloat16, 8)
    new = changed(old, torch.rand(len(old), generator=generator(9)) < 0.02, 10)
    layout = Layout.of([("w", old)])
    delta = encoded(layout, [old], [new], mode="values")
    delta.blocks.add_(torch.tensor(sizes, dtype=torch.int32))
    target = old.clone()
    with pytest.raises(DeltaCorrupt, match="block 0"):
        apply_delta_(delta, Plan.direct(layout, [("w", target)]))
    assert same_bits(target, old)


def test_the_first_damaged_block_is_named(backend: native.Library) -> None:
    old = random_bits(4 * 65536, torch.bfloat16, 11)
    new = changed(old, torch.rand(len(old), generator=generator(12)) < 0.02, 13, ulps=1)
    layout = Layout.of([("w", old)])
    delta = encoded(layout, [old], [new], mode="steps")
    at = int((delta.blocks[:2] & BYTES).sum())
    delta.payload[at] = 255  # a Rice parameter that does not exist
    with pytest.raises(DeltaCorrupt, match="block 2 is damaged"):
        check_delta(delta, Plan.direct(layout, [("w", old)]))


def test_bytes_on_the_wire_are_refused_wherever_they_are_damaged() -> None:
    old = random_bits(3000, torch.bfloat16, 14)
    new = changed(old, torch.arange(3000) % 50 == 0, 15)
    layout = Layout.of([("w", old)])
    data = encoded(layout, [old], [new], mode="steps").to_bytes()
    assert same_bits_after(layout, data, old, new)
    for cut in range(0, len(data), 7):
        with pytest.raises(DeltaCorrupt):
            Delta.from_bytes(layout, data[:cut])
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(DeltaCorrupt):
            Delta.from_bytes(layout, bytes(damaged))


def same_bits_after(layout: Layout, data: bytes, old: Tensor, new: Tensor) -> bool:
    target = old.clone()
    apply_delta_(Delta.from_bytes(layout, data), Plan.direct(layout, [("w", target)]))
    return same_bits(target, new) and Delta.from_bytes(layout, data).digest == digest_of(layout, [new])


@pytest.mark.processes
def test_sanitizers_find_nothing_in_encoders_and_decoders(build: dict[str, Any], tmp_path: Path) -> None:
    """A build with address and undefined-behaviour checks, fed with everything above and more."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
    library = build["build_cpu"](tmp_path, True, print, flags)
    if library is None:
        pytest.skip("needs a C++ compiler for x86-64")
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    script = textwrap.dedent(f"""
        import pathlib
        from tests.kernels import sanitized
        sanitized.main(pathlib.Path({str(library)!r}))
    """)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=200, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all blocks went through" in done.stdout
