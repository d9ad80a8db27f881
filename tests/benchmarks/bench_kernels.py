"""Deltas of weights: how small they are, and how fast they are made and applied, on the CPU.

    python -m tests.benchmarks.bench_kernels [--quick] [--encoder] [--out bench.json]

Sizes are those of Adam-like updates of normal weights, against the dense bf16 tensor and against the entropy of
independent changes. Times are of both sides in turns in one process, on as many threads as torch uses; the rival of
the encoder, at four densities, is what the field does: `torch.ne`, `nonzero`, a gather, indices as int32. The rival
of one application to many small tensors is a dense copy of each.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from tests.benchmarks.bench_rows import Row, append_rows, compared, table
from tests.benchmarks.throttled import Link
from tests.kernels.test_delta import adam_like, entropy_bound_bytes

from treadle.kernels.cast_diff import CastDiff, packed_bits
from treadle.kernels.delta import Delta, apply_delta_, check_delta, encode_delta
from treadle.kernels.digest import Partial, partial_digest, partial_digest_eager
from treadle.kernels.layout import Layout
from treadle.kernels.plan import Plan
from treadle.kernels.streamed_mm import streamed_mm

DENSITIES = (0.017, 0.04, 0.11, 0.24)
NOTHING = {"base": Partial(0, 0), "digest": Partial(0, 0)}
UNIT = "ms (ratio below 1: faster)"
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


def encoding(numel: int, density: float, rounds: int) -> list[Row]:
    """The encoder from each of its sources. What `ne` and `nonzero` take without the gather is told beside it."""
    old, new = adam_like(numel, density)
    layout = Layout.of([("w", old)])
    dirty = [packed_bits(old.view(torch.int16) != new.view(torch.int16))]
    ways: dict[str, Callable[[], object]] = {
        "old and new to steps": lambda: encode_delta(layout, [new], before=[old], **NOTHING),
        "old and new to values": lambda: encode_delta(layout, [new], before=[old], steps=False, **NOTHING),
        "bitmap to values": lambda: encode_delta(layout, [new], dirty=dirty, **NOTHING),
    }
    rows = []
    for way, ours in ways.items():
        mine, located = turns(ours, lambda: (old != new).nonzero(), rounds)
        again, theirs = turns(ours, lambda: gathered(old, new), rounds)
        mine = min(mine, again)
        rows.append(
            compared(
                f"encode, {way}, {100 * density:.1f} % changed, against ne + nonzero + gather",
                *(mine, theirs, UNIT),
                command=COMMAND,
                detail=f"{theirs / mine:.1f} times as fast, {located / mine:.1f} times without the gather; "
                f"{numel:,} bf16 elements, {threads()}",
            )
        )
    return rows


def threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread" + "s" * (count > 1)


def speeds(numel: int, rounds: int) -> list[Row]:
    old, new = adam_like(numel, 0.017)
    layout = Layout.of([("w", old)])
    master, parameter = new.float(), old.clone()
    cast = CastDiff(layout, [master], [parameter])
    cast.step()
    detail = f"{numel:,} bf16 elements, 1.7 % changed, {threads()}"

    def row(name: str, ours: Callable[[], object], theirs: Callable[[], object]) -> Row:
        return compared(name, *turns(ours, theirs, rounds), UNIT, command=COMMAND, detail=detail)

    def step() -> None:
        parameter.copy_(old)
        cast.step()

    def copy_and_compare() -> None:
        parameter.copy_(old)
        before = parameter.clone()
        parameter.copy_(master)
        gathered(before, parameter)

    return [
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
        UNIT,
        command=COMMAND,
        detail=f"{old.numel():,} bf16 elements, 1.7 % changed, digest verified before the write",
    )


class Arrival:
    """Rows of `a` over a link, chunk by chunk, from a thread; a copy engine's part is played by a sleeping sender."""

    CHUNKS = 32

    def __init__(self, side: int) -> None:
        self.whole, self.b = (torch.randn(side, side) for _ in range(2))
        self.a, self.out = torch.empty_like(self.whole), torch.empty_like(self.whole)
        self.ready = torch.zeros(self.CHUNKS, dtype=torch.int32)
        self.rows, self.epoch, self.bytes_per_s = side // self.CHUNKS, 0, 0.0

    def send(self) -> None:
        link = Link(self.bytes_per_s)
        for c in range(self.CHUNKS):
            rows = slice(c * self.rows, (c + 1) * self.rows)
            link(self.whole[rows].nbytes)
            self.a[rows] = self.whole[rows]
            self.ready[c] = self.epoch

    def multiply(self) -> None:
        streamed_mm(
            self.a,
            self.b,
            self.ready,
            epoch=self.epoch,
            chunk_rows=self.rows,
            deadline_s=60,
            out=self.out,
        )

    def together(self) -> None:
        self.epoch += 1
        sender = threading.Thread(target=self.send)
        sender.start()
        self.multiply()
        sender.join()

    def in_turns(self) -> None:
        self.epoch += 1
        self.send()
        self.multiply()

    def then_torch(self) -> None:
        self.send()
        torch.mm(self.a, self.b, out=self.out)


def overlapping(side: int, rounds: int) -> list[Row]:
    """A product of rows that come over a link, which takes as long as the product.
    E = (t_c + t_m − t_o) / min(t_c, t_m), 1 when the shorter side is hidden."""
    given = Arrival(side)
    compute, torchs = turns(given.multiply, lambda: torch.mm(given.a, given.b, out=given.out), rounds)
    given.bytes_per_s = given.whole.nbytes / (1e-3 * compute)
    together, in_turns = turns(given.together, given.in_turns, rounds)
    copies, rival = turns(given.send, given.then_torch, rounds)
    hidden, control = ((compute + copies - both) / min(compute, copies) for both in (together, in_turns))
    detail = (
        f"{side} × {side} fp32; product alone {compute:.1f} ms, torch's {torchs:.1f} ms, the link {copies:.1f} ms; "
        f"overlap {hidden:.2f}, in turns it reads {control:.2f}; {threads()}"
    )
    return [
        compared(
            "streamed_mm against its rows' copy and then itself",
            *(together, in_turns, UNIT),
            command=COMMAND,
            detail=detail,
        ),
        compared(
            "streamed_mm against its rows' copy and then torch.mm",
            *(together, rival, UNIT),
            command=COMMAND,
            detail=detail,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller tensors, fewer turns")
    parser.add_argument("--encoder", action="store_true", help="only how fast deltas are made")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    given = parser.parse_args()
    numel, rounds = (4_000_000, 3) if given.quick else (32_000_000, 9)
    sized: list[Row] = []
    timed: list[Row] = []
    if not given.encoder:
        sized = sizes(numel // 4)
        timed = [*speeds(numel, rounds), applying(rounds), *overlapping(256 if given.quick else 1024, rounds)]
    timed += [row for density in DENSITIES for row in encoding(numel, density, rounds)]
    append_rows(given.out, sized + timed)
    print(table([asdict(row) for row in sized + timed]))
    for row in timed:
        print(f"{row.name}: {row.detail}")


if __name__ == "__main__":
    main()
