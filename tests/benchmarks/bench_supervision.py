"""What it costs a step that every process is watched.

    python -m tests.benchmarks.bench_supervision [--quick] [--out bench.json]

One run of the tiny recipe, whose steps of a tenth of a second make supervision dear. Stretches at the default periods
of heartbeats, of the look at all roles and of the driver's watchdog take turns with stretches at a twentieth of these
periods: nineteen times the default's cost on top, which a busy machine does not hide as it hides the cost itself.
Figures: the median step time, and the processor time of all the run's processes per step, each over that of the
stretches before and after, with what that leaves for the default periods. After a switch, steps are left out until all
have noticed it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from tests.benchmarks.bench_rows import Row, against_neighbours, append_rows, compared, spread, table
from tests.e2e.programs import REPOSITORY, TINY, WITH_PROMPTS

from treadle.workflows import watch, watchdog
from treadle.workflows.api import grpo, load_recipe, open_run
from treadle.workflows.configs import GrpoConfig
from treadle.workflows.run import Run

COMMAND = "python -m tests.benchmarks.bench_supervision"
OFTENER = 20
NOTICED_S = 6.0
"""The longest default period, and a bit."""
SETTINGS = ("checkpoint.every_steps=1000000", "tracking.rollouts_every=0", "stages.rl.steps=1000000")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Steps that were made under the same supervision. `cpu_s` is processor time of all processes, per step."""

    oftener: bool
    step_s: Sequence[float]
    cpu_s: float


class Supervision:
    """Changes the periods of a running run. They are settings; only the benchmark changes them on the way."""

    def __init__(self, run: Run) -> None:
        self._pool, self._group = run.crew._rollouts, run.crew._learner
        self._rollout, self._learner = self._pool._config, self._group._config
        self._watch_s, self._tick_s = watch.EVERY_S, watchdog.TICK_S

    def set(self, times: int) -> None:
        """So many times as often as by default."""
        self._pool._config = replace(self._rollout, heartbeat_s=self._rollout.heartbeat_s / times)
        self._group._config = replace(self._learner, heartbeat_s=self._learner.heartbeat_s / times)
        watch.EVERY_S, watchdog.TICK_S = self._watch_s / times, self._tick_s / times


def processor_s() -> float:
    """Of this process and all that it has started and that live."""
    spent = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            spent += times.user + times.system
    return spent


async def measured(folder: Path, stretches: int, seconds: float) -> list[Stretch]:
    """Alternating stretches, the first and the last at the default periods."""
    recipe = load_recipe(TINY, [WITH_PROMPTS, *SETTINGS])
    config = recipe.stages["rl"]
    assert isinstance(config, GrpoConfig)
    found: list[Stretch] = []
    async with open_run(recipe, folder, quiet=True) as run, run.begin("rl") as journal:
        train, supervision = run.inputs["rl"].train, Supervision(run)
        assert train is not None
        steps: list[float] = []
        switched_s, cpu_s = time.monotonic(), 0.0
        async for report in grpo(run.roles, config, train, journal):
            since_s = time.monotonic() - switched_s
            if since_s < NOTICED_S:
                continue
            if not cpu_s:
                cpu_s = processor_s()
                continue
            steps.append(report.metrics["timing_s/step"])
            if since_s < NOTICED_S + seconds:
                continue
            oftener = len(found) % 2 == 1
            found.append(Stretch(oftener=oftener, step_s=steps, cpu_s=(processor_s() - cpu_s) / len(steps)))
            if len(found) == stretches:
                return found
            supervision.set(1 if oftener else OFTENER)
            steps, switched_s, cpu_s = [], time.monotonic(), 0.0
    return found


def cost_row(what: str, unit: str, values: Sequence[float], stretches: Sequence[Stretch], detail: str) -> Row:
    """From `values`, one per stretch: the share that supervision at its default periods adds, as a ratio."""
    oftener = [stretch.oftener for stretch in stretches]
    ratio, error = against_neighbours(values, oftener)
    # with x the default's share of the rest: (1 + OFTENER x) / (1 + x) = ratio
    share = (ratio - 1) / (OFTENER - ratio)
    rest = statistics.median(v for v, dense in zip(values, oftener, strict=True) if not dense) / (1 + share)
    return compared(
        f"{what} of the tiny recipe with supervision over without",
        rest * (1 + share),
        rest,
        f"{unit} per step (goal at most 1.01)",
        command=COMMAND,
        detail=f"{OFTENER} times as often: {ratio:.3f} ± {error:.3f}, so the share is {share:.4f} ± "
        f"{error / (OFTENER - ratio):.4f}; {detail}",
    )


def rows_of(stretches: Sequence[Stretch]) -> list[Row]:
    medians = [statistics.median(stretch.step_s) for stretch in stretches]
    cpu = [stretch.cpu_s for stretch in stretches]
    steps = [second for stretch in stretches if not stretch.oftener for second in stretch.step_s]
    return [
        cost_row("step time", "s", medians, stretches, f"default steps {spread(steps)} s"),
        cost_row("processor time", "s", cpu, stretches, f"default stretches {spread(cpu[::2])} s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter stretches")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # the recipe's verifier is among the tests
    with tempfile.TemporaryDirectory(prefix="treadle-watched-") as parent:
        folder = Path(parent) / "run"
        stretches = asyncio.run(measured(folder, 5, 2.0) if given.quick else measured(folder, 21, 8.0))
    for stretch in stretches:
        often = f"{OFTENER} times as often" if stretch.oftener else "as by default"
        print(f"{often:20} {spread(stretch.step_s)} s, {stretch.cpu_s:.4f} s of processor time per step")
    rows = rows_of(stretches)
    append_rows(given.out, rows)
    print(table([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
