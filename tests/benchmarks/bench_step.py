"""GRPO step time: Treadle with every role real against TRL's `GRPOTrainer`, side by side in one run.

    python -m tests.benchmarks.bench_step [--quick] [--load demo|tail] [--setup NAME | --search] [--out bench.json]

Each process trains one side from the same model, one side at a time, in turns (A B A B …); its first steps are left
out. The figure of a side is the median over the steps of all its processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tests.benchmarks.bench_rows import (
    Row,
    append_rows,
    compared,
    hardware,
    lengths_line,
    run_child,
    run_command,
    spread,
    table,
)
from tests.benchmarks.step_loads import LOADS, Load, prepare
from tests.benchmarks.step_ours import StepRun
from tests.benchmarks.trl_setups import SETUPS, SHORTLIST

START_DEADLINE_S = 420.0
"""For a side's processes to start, load and end."""
COMMAND = "python -m tests.benchmarks.bench_step"


def merged(runs: Sequence[StepRun]) -> StepRun:
    """Several processes of a side as one; the first one's phases."""
    return replace(
        runs[0],
        step_s=[s for run in runs for s in run.step_s],
        lengths=[n for run in runs for n in run.lengths],
        reward_mean=statistics.fmean(run.reward_mean for run in runs),
        zero_spread=statistics.fmean(run.zero_spread for run in runs),
    )


def of_ranks(runs: Sequence[StepRun]) -> StepRun:
    """The ranks of one data-parallel run: all samples, and each step's time once (that of the slowest rank)."""
    together = merged(runs)
    return replace(together, step_s=[max(times) for times in zip(*(run.step_s for run in runs), strict=True)])


def step_row(load: Load, ours: StepRun, theirs: StepRun) -> Row:
    """The medians against each other."""
    return compared(
        f"step, {load.name}: {load.title}",
        statistics.median(ours.step_s),
        statistics.median(theirs.step_s),
        "s per step (ratio below 1: ours is faster)",
        command=f"{COMMAND} --load {load.name}",
        detail=f"theirs: {theirs.setup}; medians of {len(ours.step_s)} and {len(theirs.step_s)} steps",
    )


class Bench:
    """Runs processes of both sides of one load, whose model lies in `folder`. What they write begins with `label`."""

    def __init__(self, load: Load, folder: Path, label: str = "turn") -> None:
        self._load, self._folder, self._label = load, folder, label
        self._count = 0

    def ours(self) -> StepRun:
        out = self._out("ours")
        run_child(
            "tests.benchmarks.step_ours",
            self._arguments(out),
            log=out.with_suffix(".log"),
            deadline_s=self._deadline_s,
            OMP_NUM_THREADS="1",
        )
        return StepRun.read(out)

    def theirs(self, name: str) -> StepRun:
        setup, out = SETUPS[name], self._out(name)
        module = ["-m", "tests.benchmarks.step_trl", *self._arguments(out), "--setup", name]
        if setup.processes == 1:
            command = [sys.executable, *module]
        else:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={setup.processes}"]
            command = [sys.executable, *launcher, *module]
        run_command(
            command,
            log=out.with_suffix(".log"),
            deadline_s=self._deadline_s,
            OMP_NUM_THREADS=str(setup.threads),
            ACCELERATE_USE_CPU="true",
            HF_HUB_OFFLINE="1",
            TOKENIZERS_PARALLELISM="false",
        )
        return of_ranks(
            [StepRun.read(out.with_name(f"{out.name}.{rank}")) for rank in range(setup.processes)]
        )

    @property
    def _deadline_s(self) -> float:
        return START_DEADLINE_S + (self._load.warm_steps + self._load.steps) * self._load.step_deadline_s

    def _out(self, side: str) -> Path:
        self._count += 1
        return self._folder / f"{self._label}-{self._count:02d}-{side}.json"

    def _arguments(self, out: Path) -> list[str]:
        load = self._load
        return [
            *("--load", load.name, "--folder", str(self._folder), "--out", str(out)),
            *("--warm", str(load.warm_steps), "--steps", str(load.steps)),
        ]


def search(load: Load, folder: Path, setups: Iterable[str]) -> str:
    """The name of TRL's fastest configuration; one that does not run is reported and left out."""
    bench = Bench(quick(load), folder, "search")
    medians: dict[str, float] = {}
    for name in setups:
        try:
            run = bench.theirs(name)
        except RuntimeError as error:
            print(f"  {name}: does not run: {str(error).splitlines()[-1]}", flush=True)
            continue
        medians[name] = statistics.median(run.step_s)
        print(f"  {name}: {spread(run.step_s)} s  ({run.setup})", flush=True)
    if not medians:
        raise RuntimeError(f"None of TRL's configurations runs on load {load.name}.")
    return min(medians, key=medians.__getitem__)


def compare(load: Load, bench: Bench, setup: str) -> Row:
    """Both sides in turns; prints what was measured and returns the row."""
    ours, theirs = [], []
    for number in range(load.rounds):
        ours.append(bench.ours())
        print(f"  ours {number + 1}/{load.rounds}: {spread(ours[-1].step_s)} s, {hardware()}", flush=True)
        theirs.append(bench.theirs(setup))
        print(f"  TRL  {number + 1}/{load.rounds}: {spread(theirs[-1].step_s)} s, {hardware()}", flush=True)
    for name, run in (("ours", merged(ours)), ("TRL", merged(theirs))):
        print(f"{name}: {run.setup}")
        print(f"  {spread(run.step_s)} s per step; reward {run.reward_mean:.3f}", end="")
        print(f"; groups without spread {run.zero_spread:.1%}")
        print(f"  {lengths_line(run.lengths, load.max_new_tokens)}")
    phases = ", ".join(f"{name.split('/')[1]} {value:.3f}" for name, value in ours[0].phases_s.items())
    print(f"  ours, mean seconds of a step: {phases}")
    return step_row(load, merged(ours), merged(theirs))


def quick(load: Load) -> Load:
    """The same load with fewer steps, for trying out."""
    return replace(load, warm_steps=1, steps=min(2, load.steps), rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", choices=sorted(LOADS), default="", help="one load only")
    parser.add_argument(
        "--setup", choices=sorted(SETUPS), default="", help="TRL's configuration; default: the faster of two"
    )
    parser.add_argument("--search", action="store_true", help="try all of TRL's configurations first")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="models, runs and logs")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    given = parser.parse_args()
    rows = []
    for load in (LOADS[given.load],) if given.load else tuple(LOADS.values()):
        folder = given.folder.resolve() / load.name
        print(f"{load.name}: {load.title}; process group {os.getpgrp()}; {hardware()}", flush=True)
        prepare(load, folder)
        load = quick(load) if given.quick else load
        setup = given.setup or search(load, folder, SETUPS if given.search else SHORTLIST)
        rows.append(compare(load, Bench(load, folder), setup))
        append_rows(given.out, rows[-1:])
    print(table([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
