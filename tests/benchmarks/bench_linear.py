"""The linear layers of one decode step on one core, three ways: panels (`kernels/decode.py`, for models of the Llama
family), packed weights (`rollout/packed_linear.py`, for the others), and plain ones.

    python -m tests.benchmarks.bench_linear [--quick] [--out bench.json]

All run all linear layers of the 15M model of `step_loads`, in the model's order, so that weights come from
memory as they do when decoding. They take turns in one process.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tests.benchmarks.bench_rows import Row, Stopwatch, append_rows, compared, spread, table
from tests.benchmarks.step_loads import TAIL_SHAPE
from torch import nn

from treadle.actors.learner.onednn import use_onednn
from treadle.actors.rollout.packed_linear import pack_linears
from treadle.kernels.decode import Panels

ROWS = (4, 8, 16, 32)
TRAINED_ROWS = 2048
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


def paneled(layers: nn.ModuleList) -> nn.ModuleList:
    """The layers, computing with panels."""
    for layer in layers:
        panels = Panels(layer.weight.detach())
        layer.forward = partial(_product, panels)
    return layers


def _product(panels: Panels, x: torch.Tensor) -> torch.Tensor:
    return panels.product(x.view(-1, panels.inputs), None)


@torch.inference_mode()
def measured(rows: int, rounds: int, steps: int) -> list[Row]:
    """All in turns, the first turn of each left out."""
    plain, packed = linears(), linears()
    packed.load_state_dict(plain.state_dict())
    assert pack_linears(packed, rows), "the layers are too small to be packed"
    d, inner = TAIL_SHAPE.hidden, TAIL_SHAPE.intermediate
    inputs = {size: torch.randn(rows, 1, size) for size in (d, inner)}
    sides = {"panels": paneled(linears()), "packed": packed, "plain": plain}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, layers in sides.items():
            times[name].append(turn(layers, inputs, steps))
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    print(f"{rows} rows: {', '.join(f'{name} {spread(taken[1:])}' for name, taken in times.items())} ms")
    return [
        compared(
            f"linear layers of a decode step, 15M, {rows} rows, {name}",
            medians[name],
            medians["plain"],
            "ms per step, one core (ratio below 1: faster than plain)",
            command=COMMAND,
            detail=f"medians of {rounds} turns of {steps} steps",
        )
        for name in ("panels", "packed")
    ]


def training_turn(layers: nn.ModuleList, inputs: dict[int, torch.Tensor], steps: int) -> float:
    """Milliseconds of a forward and a backward pass through all layers."""
    clock = Stopwatch()
    for _ in range(steps):
        for layer in layers:
            layer(inputs[layer.in_features]).sum().backward()
    return 1e3 * clock.lap() / steps


def trained(rounds: int) -> Row:
    """A rank's linear layers, both ways in turns."""
    plain, ours = linears(), linears()
    use_onednn(ours)
    d, inner = TAIL_SHAPE.hidden, TAIL_SHAPE.intermediate
    inputs = {size: torch.randn(TRAINED_ROWS, size, requires_grad=True) for size in (d, inner)}
    sides = {"oneDNN": ours, "plain": plain}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, layers in sides.items():
            times[name].append(training_turn(layers, inputs, 1))
    print(f"training: {', '.join(f'{name} {spread(taken[1:])}' for name, taken in times.items())} ms")
    return compared(
        f"linear layers of a training step, 15M, {TRAINED_ROWS} tokens, oneDNN",
        statistics.median(times["oneDNN"][1:]),
        statistics.median(times["plain"][1:]),
        "ms forward and backward, one core (ratio below 1: faster than plain)",
        command=COMMAND,
        detail=f"medians of {rounds} turns",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rounds, steps = (1, 10) if given.quick else (9, 30)
    rows = [row for count in ROWS for row in measured(count, rounds, steps)]
    rows.append(trained(rounds))
    append_rows(given.out, rows)
    print(table([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
