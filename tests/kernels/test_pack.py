"""Packing: buckets, scales and flags are the twin's, and what is unpacked is what was packed."""

from __future__ import annotations

import threading

import pytest
import torch
from tests.kernels.weights import generator, random_bits, same_bits
from torch import Tensor

from treadle.kernels import native
from treadle.kernels.pack import Form, Packing
from treadle.kernels.pack_eager import quantised
from treadle.kernels.staging import StagingRing

SHAPES = [(1,), (300,), (128, 128), (129, 257), (1, 5), (200, 3), (0,), (3, 130, 140)]


def weights(dtype: torch.dtype, seed: int, *, wild: bool = True) -> list[Tensor]:
    """Every second matrix is a part of a wider one. `wild`: every bit pattern there is."""
    found = []
    for i, shape in enumerate(SHAPES):
        n = int(torch.Size(shape).numel())
        flat = (
            random_bits(n, dtype, seed + i)
            if wild
            else torch.randn(n, generator=generator(seed + i)).to(dtype)
        )
        tensor = flat.view(shape)
        if len(shape) == 2 and i % 2:
            wide = torch.zeros(shape[0], shape[1] + 7, dtype=dtype)
            wide[:, 3:-4] = tensor
            tensor = wide[:, 3:-4]
        found.append(tensor)
    return found


def packed(
    tensors: list[Tensor], form: Form, chunk_bytes: int = 5000
) -> tuple[Packing, Tensor, Tensor, Tensor]:
    packing = Packing(tensors, form=form, chunk_bytes=chunk_bytes)
    bucket, scales, flags = packing.buffers(torch.device("cpu"))
    bucket.fill_(0xA5)
    packing.pack_(tensors, bucket, scales, flags, epoch=3)
    return packing, bucket, scales, flags


CASES: list[tuple[Form, torch.dtype]] = [
    ("copy", torch.bfloat16),
    ("copy", torch.float8_e4m3fn),
    ("copy", torch.float32),
    ("copy", torch.int64),
    ("bf16", torch.float32),
    ("fp8", torch.bfloat16),
    ("fp8", torch.float32),
    ("fp8_pow2", torch.bfloat16),
    ("fp8_pow2", torch.float32),
]


@pytest.mark.parametrize(("form", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("wild", [True, False])
def test_buckets_scales_and_flags_are_the_twins(
    backend: native.Library, form: Form, dtype: torch.dtype, wild: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = weights(dtype, 1, wild=wild)
    _, bucket, scales, flags = packed(tensors, form)
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda device: None)
        packing, twin, twin_scales, _ = packed(tensors, form)
    assert torch.equal(bucket, twin)
    assert same_bits(scales, twin_scales)
    assert flags.tolist() == [3] * packing.chunks
    assert packing.chunks > 20


@pytest.mark.parametrize(("form", "dtype"), CASES, ids=str)
def test_unpacked_tensors_are_the_twins(
    backend: native.Library, form: Form, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = weights(dtype, 5)
    packing, bucket, scales, _ = packed(tensors, form)
    targets, twins = weights(dtype, 9), weights(dtype, 9)
    packing.unpack_(targets, bucket, scales)
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda device: None)
        packing.unpack_(twins, bucket, scales)
    for target, twin, source in zip(targets, twins, tensors, strict=True):
        number = ~twin.isnan()
        assert torch.equal(target.isnan(), twin.isnan())
        assert torch.equal(target[number], twin[number])
        if form == "copy":
            assert same_bits(target.contiguous(), source.contiguous())


@pytest.mark.parametrize("form", ["fp8", "fp8_pow2"])
def test_quantised_weights_are_near_and_from_the_rounded_value(backend: native.Library, form: Form) -> None:
    """e4m3 has three bits of mantissa: half a step is 1/16; near zero, half of 2⁻⁹ of the scale."""
    full = [torch.randn(300, 200, generator=generator(1)) * 0.02]
    packing, bucket, scales, _ = packed(full, form)
    target = [torch.empty_like(full[0])]
    packing.unpack_(target, bucket, scales)
    error = (target[0] - full[0].bfloat16().float()).abs()
    assert bool((error <= full[0].abs() / 15.9 + scales.max() * 2.0**-10).all())
    half = [full[0].bfloat16()]
    _, again, same, _ = packed(half, form)
    assert torch.equal(again, bucket)
    assert torch.equal(same, scales)
    mantissas = set(torch.frexp(scales)[0].tolist())
    assert (mantissas == {0.5}) == (form == "fp8_pow2")


def test_blocks_of_zeros_infinities_and_nans() -> None:
    zero = torch.zeros(4, 4)
    assert quantised(zero, power_of_two=False)[1].tolist() == [[1.0]]
    odd = torch.tensor([[float("inf"), -float("inf"), float("nan"), 2.0]])
    codes, scales = quantised(odd, power_of_two=False)
    assert scales.item() == pytest.approx(2 / 448)
    assert codes.float()[0, [0, 1, 3]].tolist() == [448, -448, 448]
    assert bool(codes.float()[0, 2].isnan())


def test_chunks_that_no_kernel_wrote_are_not_ready(backend: native.Library) -> None:
    """The flags count bytes: with a table that expects one byte more, a chunk never becomes ready."""
    tensors = [torch.randn(4000)]
    packing = Packing(tensors, chunk_bytes=4096)
    packing.expected[2] += 1
    bucket, scales, flags = packing.buffers(torch.device("cpu"))
    packing.pack_(tensors, bucket, scales, flags, epoch=1)
    assert flags.tolist() == [1, 1, 0, 1]


def test_threads_do_not_change_a_bucket(cpu_library: object, threads: int) -> None:
    tensors = weights(torch.bfloat16, 3)
    torch.set_num_threads(threads)
    _, bucket, scales, flags = packed(tensors, "fp8")
    torch.set_num_threads(1)
    _, alone, alone_scales, _ = packed(tensors, "fp8")
    assert torch.equal(bucket, alone)
    assert same_bits(scales, alone_scales)
    assert bool((flags == 3).all())


def test_the_ring_hands_every_version_from_packer_to_transport_in_order(cpu_library: object) -> None:
    """The transport sends chunk by chunk; the packer never overwrites a bucket that is not drained."""
    tensors = [torch.zeros(5000), torch.zeros(70, 33)]
    packing = Packing(tensors, chunk_bytes=4096)
    ring = StagingRing(packing, count=2, device=torch.device("cpu"))
    slots, sent = [], []
    there = threading.Semaphore(0)

    def transport() -> None:
        for turn in range(20):
            assert there.acquire(timeout=20)
            slot = slots[turn]
            for chunk in range(packing.chunks):
                ring.wait_chunk(slot, chunk, timeout_s=20)
            sent.append(slot.bucket.clone())
            ring.drained(slot)

    worker = threading.Thread(target=transport)
    worker.start()
    for turn in range(20):
        slot = ring.acquire(timeout_s=20)
        for tensor in tensors:
            tensor.fill_(turn)
        slots.append(slot)
        there.release()
        packing.pack_(tensors, slot.bucket, slot.scales, slot.flags, epoch=slot.epoch)
    worker.join(timeout=30)
    targets = [torch.empty_like(t) for t in tensors]
    assert len(sent) == 20
    for turn, bucket in enumerate(sent):
        packing.unpack_(targets, bucket, torch.empty(0))
        assert all(bool((t == turn).all()) for t in targets)


def test_waits_end_and_name_who_is_late() -> None:
    ring = StagingRing(Packing([torch.zeros(10)]), count=1, device=torch.device("cpu"))
    slot = ring.acquire(timeout_s=1)
    with pytest.raises(TimeoutError, match=r"slot 0 is not drained after 0\.01 s"):
        ring.acquire(timeout_s=0.01)
    with pytest.raises(TimeoutError, match="chunk 0 of epoch 1 is not packed"):
        ring.wait_chunk(slot, 0, timeout_s=0.01)
    ring.drained(slot)
    with pytest.raises(ValueError, match="given back already"):
        ring.drained(slot)
    with pytest.raises(ValueError, match="count=0"):
        StagingRing(Packing([torch.zeros(10)]), count=0, device=torch.device("cpu"))


def test_tensors_that_do_not_fit_the_form_or_the_packing_are_refused() -> None:
    with pytest.raises(ValueError, match="form bf16 takes"):
        Packing([torch.zeros(3, dtype=torch.bfloat16)], form="bf16")
    with pytest.raises(ValueError, match=r"columns of .* are not neighbours"):
        Packing([torch.zeros(4, 6).t()])
    with pytest.raises(ValueError, match="view_as_real"):
        Packing([torch.zeros(3, dtype=torch.complex64)])
    with pytest.raises(ValueError, match="must be one of"):
        Packing([], form="int4")  # type: ignore[arg-type]
    packing = Packing([torch.zeros(4, 6)])
    bucket, scales, flags = packing.buffers(torch.device("cpu"))
    for other in ([torch.zeros(4, 5)], [torch.zeros(4, 6).double()], [torch.zeros(4, 12)[:, :6]]):
        with pytest.raises(ValueError, match="not those of the packing"):
            packing.pack_(other, bucket, scales, flags, epoch=1)
    with pytest.raises(ValueError, match="needed are 96 and 0"):
        packing.pack_([torch.zeros(4, 6)], bucket[:90], scales, flags, epoch=1)
