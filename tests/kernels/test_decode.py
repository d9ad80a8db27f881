"""A decode step's kernels against their twins, and that a row's bits are its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.kernels.conftest import ISAS

from treadle.kernels import decode, native
from treadle.kernels.errors import KernelError

CAPACITY, SLOTS = 96, 6


@pytest.fixture(params=sorted(ISAS))
def isa(request: pytest.FixtureRequest, cpu_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each instruction set of the library in turn."""
    try:
        library = native.Library(cpu_library, ISAS[request.param])
    except KernelError as error:
        pytest.skip(f"this processor: {error}")
    monkeypatch.setattr(native, "library", lambda device: library)
    yield
    native.Library(cpu_library)


def heads_of(heads: int, kv_heads: int, size: int, *, normed: bool = False) -> decode.Heads:
    torch.manual_seed(1)
    angle = torch.rand(CAPACITY, size // 2) * 6
    layer = decode.Heads(
        heads=heads,
        kv_heads=kv_heads,
        size=size,
        cos=torch.cat((angle, angle), 1).cos(),
        sin=torch.cat((angle, angle), 1).sin(),
        scale_eps=torch.tensor([size**-0.5, 1e-6]),
    )
    return replace(layer, q_norm=torch.rand(size) + 0.5, k_norm=torch.rand(size) + 0.5) if normed else layer


def inputs_of(
    layer: decode.Heads, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """qkv, positions, keys, values."""
    torch.manual_seed(2)
    width = (layer.heads + 2 * layer.kv_heads) * layer.size
    cache = torch.randn(2, SLOTS, layer.kv_heads, CAPACITY, layer.size)
    positions = torch.tensor([0, 1, 15, 16, 40, CAPACITY - 1])[:rows]
    return torch.randn(rows, width), positions, cache[0].clone(), cache[1].clone()


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 48), (33, 384), (0, 32)])
@pytest.mark.usefixtures("isa")
def test_norms_and_gates_equal_their_twins(rows: int, width: int) -> None:
    torch.manual_seed(0)
    x, weight, eps = torch.randn(rows, width) * 3, torch.rand(width), torch.tensor([1e-5])
    torch.testing.assert_close(decode.rms_norm(x, weight, eps), decode.rms_norm_eager(x, weight, eps))
    both = torch.randn(rows, 2 * width) * torch.linspace(0.1, 40, 2 * width)
    torch.testing.assert_close(decode.silu_gate(both), decode.silu_gate_eager(both), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(1, 1, 32), (6, 2, 64), (4, 4, 32), (14, 2, 96), (8, 1, 256)]
)
@pytest.mark.usefixtures("isa")
def test_attention_equals_its_twin_and_fills_the_cache(
    heads: int, kv_heads: int, size: int, normed: bool
) -> None:
    layer = heads_of(heads, kv_heads, size, normed=normed)
    qkv, positions, keys, values = inputs_of(layer, SLOTS)
    want_keys, want_values = keys.clone(), values.clone()
    found = decode.decode_attention(qkv, positions, keys, values, layer)
    want = decode.decode_attention_eager(qkv, positions, want_keys, want_values, layer)
    torch.testing.assert_close(found, want, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(keys, want_keys, atol=1e-6, rtol=1e-6)
    assert torch.equal(values, want_values)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 1, 1), (3, 17, 33), (15, 96, 640), (8, 128, 31), (0, 5, 64)]
)
@pytest.mark.usefixtures("isa")
def test_panel_products_equal_plain_ones_before_and_after_new_weights(
    rows: int, inputs: int, outputs: int
) -> None:
    torch.manual_seed(3)
    old, new = torch.randn(2, outputs, inputs)
    x, bias, residual = torch.randn(rows, inputs), torch.randn(outputs), torch.randn(rows, outputs)
    panels = decode.Panels(old)
    close = {"atol": 1e-5 * inputs**0.5, "rtol": 1e-5}
    torch.testing.assert_close(panels.product(x, None), x @ old.t(), **close)
    panels.take(new)
    torch.testing.assert_close(panels.product(x, bias), x @ new.t() + bias, **close)
    torch.testing.assert_close(panels.product(x, bias, residual), x @ new.t() + bias + residual, **close)


def test_a_row_of_a_panel_product_has_the_same_bits_in_any_company() -> None:
    torch.manual_seed(4)
    panels, x = decode.Panels(torch.randn(70, 96)), torch.randn(23, 96)
    together = panels.product(x, None)
    for rows in (1, 2, 3, 5, 8, 12):
        for start in range(0, 23 - rows, rows):
            part = x[start : start + rows].contiguous()
            assert torch.equal(panels.product(part, None), together[start : start + rows])


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(
    cpu_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = heads_of(6, 2, 64, normed=True)
    both, found = torch.randn(64, 4096), []
    for isa in ISAS.values():
        try:
            library = native.Library(cpu_library, isa)
        except KernelError:
            continue
        monkeypatch.setattr(native, "library", lambda device, library=library: library)
        for threads in (1, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            found.append(
                (
                    decode.silu_gate(both),
                    decode.rms_norm(both, both[0], torch.tensor([1e-6])),
                    decode.decode_attention(*inputs_of(layer, SLOTS), layer),
                )
            )
    native.Library(cpu_library)
    assert len(found) >= 4
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_row_has_the_same_bits_alone_and_in_company() -> None:
    layer = heads_of(6, 2, 64)
    qkv, positions, keys, values = inputs_of(layer, SLOTS)
    together = decode.decode_attention(qkv, positions, keys.clone(), values.clone(), layer)
    for row in range(SLOTS):
        alone = decode.decode_attention(
            qkv[row : row + 1],
            positions[row : row + 1],
            keys[row : row + 1].clone(),
            values[row : row + 1].clone(),
            layer,
        )
        assert torch.equal(alone[0], together[row])


def test_what_lies_beyond_a_rows_position_is_not_read() -> None:
    layer = heads_of(4, 2, 32)
    qkv, positions, keys, values = inputs_of(layer, 3)
    clean = decode.decode_attention(qkv, positions, keys.clone(), values.clone(), layer)
    for row, position in enumerate(positions.tolist()):
        keys[row, :, position + 1 :] = values[row, :, position + 1 :] = torch.nan
    assert torch.equal(decode.decode_attention(qkv, positions, keys, values, layer), clean)


@pytest.mark.usefixtures("isa")
def test_nan_stays_nan_so_that_broken_weights_are_found() -> None:
    x = torch.randn(2, 64)
    x[1, 5] = torch.nan
    assert decode.rms_norm(x, torch.ones(64), torch.tensor([1e-6])).isnan().any(1).tolist() == [False, True]
    assert decode.silu_gate(x).isnan().any(1).tolist() == [False, True]
    layer = heads_of(4, 2, 32)
    qkv, positions, keys, values = inputs_of(layer, 2)
    qkv[1, 3] = torch.nan
    assert decode.decode_attention(qkv, positions, keys, values, layer).isnan().any(1).tolist() == [
        False,
        True,
    ]


def test_large_numbers_saturate_like_the_twin() -> None:
    both = torch.tensor([[-200.0, 200.0] * 8 + [1.0] * 16])
    torch.testing.assert_close(decode.silu_gate(both), decode.silu_gate_eager(both), atol=1e-30, rtol=1e-6)


def test_a_position_outside_the_cache_is_refused_before_anything_is_written() -> None:
    layer = heads_of(4, 2, 32)
    qkv, positions, keys, values = inputs_of(layer, 2)
    before = keys.clone()
    for wrong in (CAPACITY, -1):
        positions[1] = wrong
        with pytest.raises(KernelError, match="out of range"):
            decode.decode_attention(qkv, positions, keys, values, layer)
    assert torch.equal(keys, before)


def test_widths_that_the_kernels_cannot_take_are_known_beforehand() -> None:
    assert [size for size in (8, 16, 32, 48, 64, 256, 288) if decode.head_fits(size)] == [32, 64, 256]
    assert [width for width in (8, 16, 24, 48) if decode.fits(width)] == [16, 48]
    with pytest.raises(KernelError, match="out of range"):
        decode.rms_norm(torch.ones(1, 24), torch.ones(24), torch.tensor([0.0]))


@pytest.mark.usefixtures("eager")
def test_without_the_library_the_kernels_say_how_to_build_it() -> None:
    assert not decode.available()
    with pytest.raises(KernelError, match=r"kernels/build\.py"):
        decode.silu_gate(torch.ones(1, 32))
