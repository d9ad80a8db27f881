"""Deltas of weights: how small they are, and how fast they are made and applied, on the CPU.

    python -m tests.benchmarks.bench_kernels [--quick] [--out bench.json]

Sizes are those of Adam-like updates of normal weights, against the dense bf16 tensor and against the entropy of
independent changes. Times are of both sides in turns in one process, on as many threads as torch uses; the rival of
the encoder is what the field does: `torch.ne`, `nonzero`, a gather, indices as int32. The rival of one application
to many small tensors is a dense copy of each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from tests.benchmarks.bench_rows import Row, append_rows, compared, table
from tests.kernels.test_delta import adam_like, entropy_bound_bytes

from treadle.kernels.cast_diff import CastDiff
from treadle.kernels.delta import Delta, apply_delta_, check_delta, encode_delta
from treadle.kernels.digest import Partial, partial_digest, partial_digest_eager
from treadle.kernels.layout import Layout
from treadle.kernels.plan import Plan

DENSITIES = (0.017, 0.04, 0.11, 0.24)
NOTHING = {"base": Partial(0, 0), "digest": Partial(0, 0)}
COMMAND = "python -m tests.benchmarks.bench_kernels"
EXPERTS = 6144


def turns(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Milliseconds of the fastest turn of both, the first left out: other work on the machine only adds."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for side, work in zip(found, (ours, theirs), strict=True):
            start = time.perf_counter()
            work()
            side.append(1e3 * (time.perf_counter() - start))
    return min(found[0][1:]), min(found[1][1:])


def sizes(numel: int) -> list[Row]:
    rows = []
    for density in DENSITIES:
        old, new = adam_like(numel, density)
        layout = Layout.of([("w", old)])
        delta = encode_delta(layout, [new], before=[old], **NOTHING)
        values = encode_delta(layout, [new], before=[old], steps=False, **NOTHING)
        bound, dense = entropy_bound_bytes(old, new), 2 * numel
        name, detail = f"{100 * delta.density:.1f} % changed", f"{numel:,} bf16 elements"
        unit = "bytes; 'theirs' is {} (steps, ratio below 1: smaller)"
        rows.append(
            compared(
                f"delta against dense, {name}",
                delta.nbytes,
                dense,
                unit.format("the dense tensor"),
                command=COMMAND,
                detail=f"{detail}; {dense / delta.nbytes:.1f} times smaller, as values {dense / values.nbytes:.1f}",
            )
        )
        rows.append(
            compared(
                f"delta against entropy, {name}",
                delta.nbytes,
                bound,
                unit.format("the entropy bound"),
                command=COMMAND,
                detail=detail,
            )
        )
    return rows


def gathered(old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and values of what changed, as others send it."""
    index = (old != new).nonzero().squeeze(-1)
    return index.to(torch.int32), new[index]


def speeds(numel: int, rounds: int) -> list[Row]:
    old, new = adam_like(numel, 0.017)
    layout = Layout.of([("w", old)])
    master, parameter = new.float(), old.clone()
    cast = CastDiff(layout, [master], [parameter])
    cast.step()
    unit, detail = (
        "ms (ratio below 1: faster)",
        f"{numel:,} bf16 elements, 1.7 % changed, {torch.get_num_threads()} threads",
    )

    def row(name: str, ours: Callable[[], object], theirs: Callable[[], object]) -> Row:
        return compared(name, *turns(ours, theirs, rounds), unit, command=COMMAND, detail=detail)

    def step() -> None:
        parameter.copy_(old)
        cast.step()

    def copy_and_compare() -> None:
        parameter.copy_(old)
        before = parameter.clone()
        parameter.copy_(master)
        gathered(before, parameter)

    return [
        row(
            "encode, old and new to steps, against ne + nonzero + gather",
            lambda: encode_delta(layout, [new], before=[old], **NOTHING),
            lambda: gathered(old, new),
        ),
        row(
            "encode, old and new to values, against ne + nonzero + gather",
            lambda: encode_delta(layout, [new], before=[old], steps=False, **NOTHING),
            lambda: gathered(old, new),
        ),
        row(
            "encode, bitmap to values, against ne + nonzero + gather",
            lambda: encode_delta(layout, [new], dirty=cast.dirty, **NOTHING),
            lambda: gathered(old, new),
        ),
        row("cast_diff_ against clone + copy_ + ne + nonzero + gather", step, copy_and_compare),
        row(
            "digest against its twin",
            lambda: partial_digest("w", 0, new),
            lambda: partial_digest_eager("w", 0, new),
        ),
    ]


def applying(rounds: int) -> Row:
    """An expert-heavy model: 6,144 matrices of 64 × 128 in a fused layout, 1.7 % changed."""
    old, new = adam_like(EXPERTS * 64 * 128, 0.017)
    names = [f"expert.{e}" for e in range(EXPERTS)]
    before, after = (list(t.view(EXPERTS, 64, 128).unbind()) for t in (old, new))
    layout = Layout.of(zip(names, before, strict=True))
    fused = old.view(EXPERTS, 64, 128).transpose(1, 2).contiguous()
    plan = Plan(layout)
    for name, target in zip(names, fused.unbind(), strict=True):
        plan.place(name, target, of=(64, 128), view=lambda w: w.t())
    delta: Delta = encode_delta(layout, after, before=before, steps=False, **NOTHING)
    change = check_delta(delta, plan)

    def apply() -> None:
        # Values may be applied again: their change of the digest is then none.
        apply_delta_(delta, plan, expected=Partial(0, 0))

    def copy_each() -> None:
        for target, source in zip(fused.unbind(), after, strict=True):
            target.copy_(source.t())

    apply_delta_(delta, plan, expected=change)
    assert torch.equal(fused.transpose(1, 2), new.view(EXPERTS, 64, 128))
    return compared(
        f"check and apply {EXPERTS:,} transposed tensors in one call against a copy each",
        *turns(apply, copy_each, rounds),
        "ms (ratio below 1: faster)",
        command=COMMAND,
        detail=f"{old.numel():,} bf16 elements, 1.7 % changed, digest verified before the write",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller tensors, fewer turns")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    given = parser.parse_args()
    numel, rounds = (4_000_000, 3) if given.quick else (32_000_000, 9)
    rows = [*sizes(numel // 4), *speeds(numel, rounds), applying(rounds)]
    append_rows(given.out, rows)
    print(table([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
