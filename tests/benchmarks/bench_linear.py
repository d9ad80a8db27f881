"""The linear layers of one decode step on one core: packed weights (`rollout/packed_linear.py`) against plain ones.

    python -m tests.benchmarks.bench_linear [--quick] [--out bench.json]

Both sides run all linear layers of the 15M model of `step_loads`, in the model's order, so that weights come from
memory as they do when decoding. They take turns in one process.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path

import torch
from tests.benchmarks.bench_rows import Row, Stopwatch, append_rows, compared, spread, table
from tests.benchmarks.step_loads import TAIL_SHAPE
from torch import nn

from treadle.actors.rollout.packed_linear import pack_linears

ROWS = (4, 8, 16, 32)
COMMAND = "python -m tests.benchmarks.bench_linear"


def linears() -> nn.ModuleList:
    """Query, key, value, output, gate, up and down of every layer, with random weights."""
    d, inner = TAIL_SHAPE.hidden, TAIL_SHAPE.intermediate
    kv = d // TAIL_SHAPE.heads * TAIL_SHAPE.kv_heads
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, inner), (d, inner), (inner, d)]
    return nn.ModuleList(nn.Linear(*shape, bias=False) for shape in shapes * TAIL_SHAPE.layers)


def turn(layers: nn.ModuleList, inputs: dict[int, torch.Tensor], steps: int) -> float:
    """Milliseconds of one pass through all layers."""
    clock = Stopwatch()
    for _ in range(steps):
        for layer in layers:
            layer(inputs[layer.in_features])
    return 1e3 * clock.lap() / steps


@torch.inference_mode()
def measured(rows: int, rounds: int, steps: int) -> Row:
    """Both sides in turns, the first turn of each left out."""
    plain, packed = linears(), linears()
    packed.load_state_dict(plain.state_dict())
    assert pack_linears(packed, rows), "the layers are too small to be packed"
    d, inner = TAIL_SHAPE.hidden, TAIL_SHAPE.intermediate
    inputs = {size: torch.randn(rows, 1, size) for size in (d, inner)}
    ours, theirs = [], []
    for _ in range(rounds + 1):
        ours.append(turn(packed, inputs, steps))
        theirs.append(turn(plain, inputs, steps))
    print(f"{rows} rows: packed {spread(ours[1:])}, plain {spread(theirs[1:])} ms")
    return compared(
        f"linear layers of a decode step, 15M, {rows} rows",
        statistics.median(ours[1:]),
        statistics.median(theirs[1:]),
        "ms per step, one core (ratio below 1: packed is faster)",
        command=COMMAND,
        detail=f"medians of {rounds} turns of {steps} steps",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rounds, steps = (1, 10) if given.quick else (9, 30)
    rows = [measured(count, rounds, steps) for count in ROWS]
    append_rows(given.out, rows)
    print(table([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
