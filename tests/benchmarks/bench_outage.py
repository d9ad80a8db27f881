"""What an MLflow server that is away costs a step.

    python -m tests.benchmarks.bench_outage [--quick] [--out bench.json]

One run of the tiny recipe against a real server behind a proxy. Stretches of steps in which the server answers take
turns with stretches in which it refuses connections, answers 30 s late, with 500 or with 401. Each of the latter is
compared with the calm stretches before and after it, because machines change their speed: the figure is the geometric
mean of the ratios of median step times, with its standard error. The server runs at the lowest priority: elsewhere it
would take none of these cores. Exit code 1 where a metric is not in MLflow afterwards, or is there twice.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks.bench_rows import Row, against_neighbours, append_rows, compared, spread, table
from tests.e2e.programs import TINY, WITH_PROMPTS, Program
from tests.platform.faulty_mlflow import Fault, FaultyMlflow, faulty_mlflow

COMMAND = "python -m tests.benchmarks.bench_outage"
FAULTS = (Fault.STOPPED, Fault.SLOW, Fault.ERROR, Fault.UNAUTHORIZED)
LONGEST_S = 1500.0
SETTINGS = ("checkpoint.every_steps=1000000", "tracking.rollouts_every=50", "tracking.rollouts_per_step=8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outages:
    """A run that has ended. `stretches[i]` are the seconds of the steps that were made under `faults[i]`."""

    folder: Path
    faults: Sequence[Fault]
    stretches: Sequence[Sequence[float]]
    missing: int
    """Metrics of steps in the run folder that are not in MLflow."""
    doubled: int
    metrics: int

    @property
    def ratio_and_error(self) -> tuple[float, float]:
        """Of the median step times under outages; each stretch's first step is left out: the fault changes in it."""
        medians = [statistics.median(stretch[1:]) for stretch in self.stretches]
        return against_neighbours(medians, [fault is not Fault.NONE for fault in self.faults])


def turns(rounds: int) -> tuple[Fault, ...]:
    """Every outage between two calm stretches, so many times; one stretch in front to start up."""
    return (
        Fault.NONE,
        *(fault for _ in range(rounds) for one in FAULTS for fault in (Fault.NONE, one)),
        Fault.NONE,
    )


def run_with_outages(parent: Path, faults: Sequence[Fault], width: int) -> Outages:
    """A run of the tiny recipe whose every `width` steps meet the next fault. Raises `RuntimeError` where it fails."""
    folder = parent / "run"
    with faulty_mlflow(parent, niceness=19) as server:
        tracking = (f"tracking.mlflow={server.uri}", "tracking.drain_s=120")
        steps = f"stages.rl.steps={len(faults) * width}"
        words = ("run", str(TINY), WITH_PROMPTS, *SETTINGS, *tracking, steps, "--dir", str(folder))
        with (parent / "run.log").open("w+") as log:
            program = Program(words=words)
            process = program.start_into(log)
            try:
                _switch(server, folder / "metrics.jsonl", process, faults, width)
                code = process.wait(LONGEST_S)
            except BaseException:
                process.kill()
                raise
        if code:
            raise RuntimeError(f"the run ended with {code}:\n{(parent / 'run.log').read_text()[-3000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [float(line["metrics"]["timing_s/step"]) for line in lines]
    wanted = Counter((key, line["step"]) for line in lines for key in line["metrics"])
    found = points(parent / "server.db")
    return Outages(
        folder=folder,
        faults=faults,
        stretches=[seconds[at : at + width] for at in range(0, len(seconds), width)],
        missing=(wanted - found).total(),
        doubled=(found - wanted).total(),
        metrics=wanted.total(),
    )


def points(database: Path) -> Counter[tuple[str, int]]:
    """Every (metric, step) in the server's database, with how often it is there."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as store:
        rows = store.execute("SELECT key, step, COUNT(*) FROM metrics GROUP BY run_uuid, key, step")
        return Counter({(key, step): count for key, step, count in rows})


def _switch(
    server: FaultyMlflow, metrics: Path, process: subprocess.Popen[str], faults: Sequence[Fault], width: int
) -> None:
    """Follows the run and sets each stretch's fault. Raises `RuntimeError` where the run takes too long."""
    deadline, made, offset, at = time.monotonic() + LONGEST_S, 0, 0, 0
    while at < len(faults) - 1 and process.poll() is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{made} steps in {LONGEST_S:.0f} s")
        time.sleep(0.02)
        if not metrics.exists():
            continue
        with metrics.open("rb") as file:
            file.seek(offset)
            more = file.read()
        offset, made = offset + len(more), made + more.count(b"\n")
        if made >= (at + 1) * width:
            at = made // width
            server.set(faults[at])


def outage_row(found: Outages) -> Row:
    """The ratio, with the calm steps' median as the other side's seconds."""
    ratio, error = found.ratio_and_error
    outages = sum(fault is not Fault.NONE for fault in found.faults)
    calm = [
        s
        for f, stretch in zip(found.faults, found.stretches, strict=True)
        if f is Fault.NONE
        for s in stretch[1:]
    ]
    return compared(
        "a step of the tiny recipe, MLflow away against there",
        ratio * statistics.median(calm),
        statistics.median(calm),
        "s per step (goal 0.97 to 1.03)",
        command=COMMAND,
        detail=f"standard error of the ratio {error:.3f}, {outages} outages; steps with the server "
        f"there {spread(calm)} s; of {found.metrics} metrics {found.missing} missing, {found.doubled} doubled",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter stretches")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="treadle-outage-") as parent:
        found = run_with_outages(Path(parent), turns(1 if given.quick else 6), 20 if given.quick else 40)
    for fault, stretch in zip(found.faults, found.stretches, strict=True):
        print(f"{fault.value:24} {spread(stretch[1:])}")
    row = outage_row(found)
    append_rows(given.out, [row])
    print(table([asdict(row)]))
    if found.missing or found.doubled:
        sys.exit(f"{found.missing} metrics are missing in MLflow, {found.doubled} are there twice")


if __name__ == "__main__":
    main()
