"""Checks and times one kernel; measures the ceilings that it is held against.

A check poisons the outputs, runs the kernel and compares every bit with the twin. Two controls show that the check can
fail: outputs that stay poisoned, and a twin that was given one element with another sign, must both be found different.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tests.benchmarks.gpu_proof.works import Work
from torch import Tensor

FLUSH_BYTES = 256 * 2**20  # more than any cache of a GPU
_GIGA = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kernel and what is wanted of it: `goal` as a share of the ceiling, 0 for none."""

    name: str
    prepare: Callable[[int, int, torch.device], Work]
    goal: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """`equal`: the outputs were the twin's for all data; `caught`: both controls were found different every time."""

    equal: bool
    caught: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """GB/s, a copy's reads and writes both counted; 0 where there is no such link. TFLOP/s of a bf16 product."""

    copy_gb_per_s: float
    to_host_gb_per_s: float = 0.0
    from_host_gb_per_s: float = 0.0
    product_tflop_per_s: float = 0.0


def judged(case: Case, device: torch.device, *, sizes: tuple[int, ...], seed: int) -> Judged:
    """Checks a kernel at each size, on other data each time."""
    equal = caught = True
    for turn, n in enumerate(sizes):
        work = case.prepare(n, seed + 1000 * turn, device)
        work.reset()
        before = _taken(work, device)
        work.run()
        found, wanted = _taken(work, device), [t.clone() for t in work.twin(list(work.inputs))]
        equal = equal and same(found, wanted)
        wrong = [work.inputs[0].clone(), *work.inputs[1:]]
        damage(wrong[0])
        caught = caught and not same(before, wanted) and not same(found, work.twin(wrong))
    return Judged(equal=equal, caught=caught)


def damage(tensor: Tensor) -> None:
    """Turns the sign of element 0, or its highest bit."""
    tensor.view(torch.uint8).view(-1)[tensor.element_size() - 1] ^= 0x80


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether all bits are equal."""
    pairs = zip(found, wanted, strict=True)
    return all(a.shape == b.shape and torch.equal(_bytes(a), _bytes(b)) for a, b in pairs)


def timed_ms(work: Work, device: torch.device, *, rounds: int) -> float:
    """Median milliseconds of a call; what is reset, and on a GPU the emptied cache, is not counted."""
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def before() -> None:
        work.reset()
        flush.zero_()

    return median_ms(work.run, device, rounds=rounds, before=before)


def median_ms(
    run: Callable[[], object],
    device: torch.device,
    *,
    rounds: int,
    before: Callable[[], object] = lambda: None,
) -> float:
    """CUDA events on a GPU, otherwise a clock; the first two rounds warm up."""
    found = []
    for _ in range(rounds + 2):
        before()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found[2:])


def ceilings(device: torch.device, *, size_bytes: int, rounds: int) -> Ceilings:
    """Measured first, with random data: zeros are copied faster."""
    source = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * size_bytes / median_ms(lambda: target.copy_(source), device, rounds=rounds)
    if device.type != "cuda":
        return Ceilings(copy_gb_per_s=copy * 1e3 / _GIGA)
    pinned = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    out = median_ms(lambda: pinned.copy_(source, non_blocking=True), device, rounds=rounds)
    back = median_ms(lambda: target.copy_(pinned, non_blocking=True), device, rounds=rounds)
    side = 8192
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = median_ms(lambda: a @ b, device, rounds=rounds)
    return Ceilings(
        copy_gb_per_s=copy * 1e3 / _GIGA,
        to_host_gb_per_s=size_bytes * 1e3 / out / _GIGA,
        from_host_gb_per_s=size_bytes * 1e3 / back / _GIGA,
        product_tflop_per_s=2 * side**3 * 1e3 / product / 1e12,
    )


def _taken(work: Work, device: torch.device) -> list[Tensor]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return [t.cpu().clone() for t in work.outputs()]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.view(-1)
