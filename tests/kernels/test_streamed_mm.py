"""A product of rows that are still arriving: whatever their order, it waits for each, and never longer than it may."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tests.kernels.conftest import ISAS
from tests.kernels.weights import generator, misaligned, random_bits, same_bits
from torch import Tensor

from treadle.kernels import native
from treadle.kernels.reduce import KINDS, with_one_nan
from treadle.kernels.streamed_mm import ALL_CAME, streamed_mm

HALVES = [torch.bfloat16, torch.float16]
WAIT_S = 20.0


def normal(rows: int, cols: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, cols, generator=generator(seed)).to(dtype)


def all_ready(a: Tensor, chunk_rows: int, epoch: int = 1) -> Tensor:
    return torch.full((-(-len(a) // chunk_rows),), epoch, dtype=torch.int32)


def in_order_of_k(a: Tensor, b: Tensor) -> Tensor:
    """The definition: every element is summed in fp32 in the order of k, and rounded once."""
    total = torch.zeros(len(a), b.shape[1])
    for i in range(a.shape[1]):
        total += a[:, i, None].float() * b[i].float()
    return with_one_nan(total, a.dtype)


def takes(library: native.Library, dtype: torch.dtype) -> bool:
    """Whether this backend has a product for the dtype: tensor cores take 16 bits."""
    verdict, flag = torch.tensor([ALL_CAME]), torch.zeros(1, dtype=torch.int32)
    none = torch.empty(0, dtype=dtype)
    sizes = (0, 8, 0, KINDS[dtype], flag, 1, 0, 1, verdict)
    try:
        library.call("streamed_mm", none, none, none, *sizes, device=none.device)
    except native.KernelError:
        return False
    return True


@contextlib.contextmanager
def sender(send: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join(WAIT_S)
    assert not thread.is_alive()


def arriving(
    whole: Tensor, order: Sequence[int], chunk_rows: int, *, epoch: int = 1, pause_s: float = 0.005
) -> tuple[Tensor, Tensor, Callable[[], None]]:
    """`a` full of NaN, its flags, and what brings the chunks of `whole` in `order`: the flag after the rows."""
    a = torch.full_like(whole, torch.nan)
    ready = torch.full((-(-len(whole) // chunk_rows),), epoch - 1, dtype=torch.int32)

    def send() -> None:
        for c in order:
            time.sleep(pause_s)
            rows = slice(c * chunk_rows, (c + 1) * chunk_rows)
            a[rows] = whole[rows]
            ready[c] = epoch

    return a, ready, send


@pytest.mark.parametrize("dtype", list(KINDS), ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 8), (130, 72, 40), (67, 136, 96), (256, 8, 200), (5, 64, 0)])
@pytest.mark.parametrize("chunk_rows", [1, 48, 1000])
def test_the_product_is_summed_in_the_order_of_k(
    backend: native.Library, dtype: torch.dtype, shape: tuple[int, int, int], chunk_rows: int
) -> None:
    if not takes(backend, dtype):
        pytest.skip("this backend takes 16 bits")
    m, n, k = shape
    a, b = normal(m, k, 1, dtype), normal(k, n, 2, dtype)
    found = streamed_mm(a, b, all_ready(a, chunk_rows), epoch=1, chunk_rows=chunk_rows, deadline_s=WAIT_S)
    assert same_bits(found, in_order_of_k(a, b))


@pytest.mark.parametrize("dtype", list(KINDS), ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 31, 7), (9, 65, 129)])
def test_odd_sizes_infinities_and_nans_are_the_definitions(
    cpu_library: object, threads: int, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    a, b = normal(m, k, 3, dtype), normal(k, n, 4, dtype)
    a[0, 0], b[-1, -1] = torch.inf, -torch.nan
    found = streamed_mm(a, b, all_ready(a, 5), epoch=1, chunk_rows=5, deadline_s=WAIT_S)
    assert same_bits(found, in_order_of_k(a, b))


@pytest.mark.parametrize("dtype", list(KINDS), ids=str)
@pytest.mark.parametrize("wild", ["any bits", "subnormal numbers"])
def test_any_bits_at_odd_addresses_give_what_the_definition_gives(
    cpu_library: Path, dtype: torch.dtype, wild: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, n, k = 19, 35, 23
    a, b = (misaligned(random_bits(size, dtype, size), 1) for size in (m * k, k * n))
    if wild != "any bits":
        tiny = torch.finfo(dtype).tiny / 3
        a, b = ((torch.rand(len(t), generator=generator(3)) * tiny).to(dtype) for t in (a, b))
        a, b[::2] = misaligned(a, 1), 1
        assert bool(((a != 0) & (a.abs() < torch.finfo(dtype).tiny)).any())
    a, b = a.view(m, k), b.view(k, n)
    for isa in ISAS.values():
        with contextlib.suppress(native.KernelError):  # what this processor does not have
            library = native.Library(cpu_library, isa)
            monkeypatch.setattr(native, "library", lambda device, found=library: found)
        found = streamed_mm(a, b, all_ready(a, 5), epoch=1, chunk_rows=5, deadline_s=WAIT_S)
        assert same_bits(found, in_order_of_k(a, b))
    native.Library(cpu_library)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("order", ["in order", "backwards", "shuffled"])
def test_rows_are_waited_for_in_any_order(backend: native.Library, dtype: torch.dtype, order: str) -> None:
    """What has not arrived is NaN: one element read too early would show."""
    whole, b = normal(300, 64, 5, dtype), normal(64, 72, 6, dtype)
    chunks = {
        "in order": list(range(10)),
        "backwards": list(reversed(range(10))),
        "shuffled": torch.randperm(10, generator=generator(7)).tolist(),
    }[order]
    a, ready, send = arriving(whole, chunks, 32)
    with sender(send):
        found = streamed_mm(a, b, ready, epoch=1, chunk_rows=32, deadline_s=WAIT_S)
    assert same_bits(found, in_order_of_k(whole, b))


def test_flags_that_come_before_their_rows_are_found_out(backend: native.Library) -> None:
    """The control of the test above: without waiting it would fail."""
    whole, b = normal(300, 64, 5, torch.bfloat16), normal(64, 72, 6, torch.bfloat16)
    a, ready, send = arriving(whole, range(10), 32)
    ready.fill_(1)
    with sender(send):
        found = streamed_mm(a, b, ready, epoch=1, chunk_rows=32, deadline_s=WAIT_S)
    assert bool(found.isnan().any())


def test_a_chunk_that_never_arrives_is_named_at_the_deadline(backend: native.Library) -> None:
    whole, b = normal(300, 64, 5, torch.bfloat16), normal(64, 72, 6, torch.bfloat16)
    a, ready, send = arriving(whole, [0, 1, 2, 3, 5, 6, 8, 9], 32, pause_s=0)
    began = time.monotonic()
    with sender(send), pytest.raises(TimeoutError, match=r"chunk 4 of 10 .* deadline_s=0.5"):
        streamed_mm(a, b, ready, epoch=1, chunk_rows=32, deadline_s=0.5)
    assert 0.5 <= time.monotonic() - began < WAIT_S


def test_a_late_chunk_is_waited_for_and_one_too_late_is_not(backend: native.Library) -> None:
    whole, b = normal(64, 16, 5, torch.bfloat16), normal(16, 8, 6, torch.bfloat16)
    a, ready, send = arriving(whole, [0], 64, pause_s=0.3)
    with sender(send), pytest.raises(TimeoutError, match="chunk 0 of 1"):
        streamed_mm(a, b, ready, epoch=1, chunk_rows=64, deadline_s=0.05)
    a, ready, send = arriving(whole, [0], 64, pause_s=0.3)
    with sender(send):
        found = streamed_mm(a, b, ready, epoch=1, chunk_rows=64, deadline_s=WAIT_S)
    assert same_bits(found, in_order_of_k(whole, b))


def test_a_chunk_that_arrives_twice_or_for_a_later_epoch_counts_as_arrived(backend: native.Library) -> None:
    whole, b = normal(160, 32, 8, torch.bfloat16), normal(32, 16, 9, torch.bfloat16)
    a, ready, send = arriving(whole, [1, 1, 0, 2, 0, 4, 3], 32)
    with sender(send):
        found = streamed_mm(a, b, ready, epoch=1, chunk_rows=32, deadline_s=WAIT_S)
    assert same_bits(found, in_order_of_k(whole, b))
    ready.copy_(torch.tensor([1, 2, 3, 1, 9]))
    found = streamed_mm(a, b, ready, epoch=1, chunk_rows=32, deadline_s=WAIT_S)
    assert same_bits(found, in_order_of_k(whole, b))


def test_epochs_count_round(backend: native.Library) -> None:
    a, b = normal(8, 8, 8, torch.bfloat16), normal(8, 8, 9, torch.bfloat16)
    for flag, epoch, came in ((-(2**31), 2**31 - 1, True), (2**31 - 1, -(2**31), False), (-1, 0, False)):
        ready = torch.tensor([flag], dtype=torch.int32)
        if came:
            streamed_mm(a, b, ready, epoch=epoch, chunk_rows=8, deadline_s=WAIT_S)
            continue
        with pytest.raises(TimeoutError):
            streamed_mm(a, b, ready, epoch=epoch, chunk_rows=8, deadline_s=0.02)


@pytest.mark.parametrize("dtype", list(KINDS), ids=str)
def test_the_twin_waits_in_the_same_way_and_differs_by_rounding_alone(
    eager: None, dtype: torch.dtype
) -> None:
    whole, b = normal(300, 64, 5, dtype), normal(64, 72, 6, dtype)
    a, ready, send = arriving(whole, [3, 2, 1, 0, 9, 8, 7, 4, 5, 6], 32)
    with sender(send):
        found = streamed_mm(a, b, ready, epoch=1, chunk_rows=32, deadline_s=WAIT_S)
    torch.testing.assert_close(found, in_order_of_k(whole, b), rtol=0.01, atol=1e-3)
    a, ready, send = arriving(whole, range(1, 10), 32, pause_s=0)
    with sender(send), pytest.raises(TimeoutError, match="chunk 0 of 10"):
        streamed_mm(a, b, ready, epoch=1, chunk_rows=32, deadline_s=0.2)


def test_what_does_not_fit_is_refused() -> None:
    a, b, ready = torch.zeros(4, 3), torch.zeros(3, 2), torch.zeros(2, dtype=torch.int32)

    def refused(match: str, *tensors: Tensor, chunk_rows: int = 2, deadline_s: float = 1.0) -> None:
        with pytest.raises(ValueError, match=match):
            streamed_mm(*tensors, epoch=0, chunk_rows=chunk_rows, deadline_s=deadline_s)

    refused(r"need \[M, K\], \[K, N\]", a, b.t().contiguous(), ready)
    refused("need one device and one of", a, b.double(), ready)
    refused("not contiguous", torch.zeros(3, 4).t(), b, ready)
    refused("must be positive", a, b, ready, chunk_rows=0)
    refused("must be positive", a, b, ready, deadline_s=0)
    refused(r"ready must be int32 \[2\]", a, b, ready[:1])
    refused(r"ready must be int32 \[2\]", a, b, ready.long())
