"""The demo with several seeds, and the control that must fail: rewards shuffled over the samples of a step.

    python -m tests.benchmarks.reproduce_demo [--seeds 1 2 3] [--dir runs/reproduce] [--keep] [--set key=value …]

Exits with 1 if any run leaves its bounds. All figures are held-out accuracies; `sampled` at temperature 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_rows import hardware, mean_and_sd, run_child, table

SEEDS = (1, 2, 3)
STAGES = ("sft", "grpo", "student")
CONTROL = "control"
START_LOW, START_HIGH = 0.3, 0.6
GRPO_LOW = 0.85
STUDENT_GAP = 0.05
RUN_DEADLINE_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Of one stage's model: 95 % half-width `ci95` of `sampled`."""

    sampled: float
    greedy: float
    ci95: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRun:
    """One run of the demo; `stages` holds those that were evaluated."""

    name: str
    seed: int
    wall_s: float
    stages: dict[str, Accuracy]

    @classmethod
    def of(cls, name: str, summary: Mapping[str, Any]) -> DemoRun:
        """From a run's `summary.json`."""
        return cls(
            name=name,
            seed=int(summary["seed"]),
            wall_s=float(summary["wall_s"]),
            stages={
                stage: Accuracy(sampled=found["sampled"], greedy=found["greedy"], ci95=found["ci95"])
                for stage, found in summary["eval"].items()
            },
        )


def broken_bounds(run: DemoRun) -> list[str]:
    """What a run of the demo had to reach and did not."""
    start, end, student = (run.stages[stage].sampled for stage in STAGES)
    broken = []
    if not START_LOW <= start <= START_HIGH:
        broken.append(f"{run.name}: sft starts at {start:.3f}, outside {START_LOW} … {START_HIGH}")
    if end < GRPO_LOW:
        broken.append(f"{run.name}: grpo ends at {end:.3f}, below {GRPO_LOW}")
    if student < end - STUDENT_GAP:
        broken.append(
            f"{run.name}: the student's {student:.3f} is over {STUDENT_GAP} below its teacher's {end:.3f}"
        )
    return broken


def broken_control(run: DemoRun) -> list[str]:
    """The control must end below where it began: what raised it otherwise would not be the reward."""
    start, end = run.stages["sft"].sampled, run.stages["grpo"].sampled
    return (
        []
        if end < start
        else [f"{run.name}: with shuffled rewards {start:.3f} became {end:.3f}; it must fall"]
    )


def lines_of(runs: Sequence[DemoRun]) -> list[dict[str, object]]:
    """A table line per run, then mean and standard deviation over them."""
    lines: list[dict[str, object]] = []
    for run in runs:
        cells = {
            f"{stage} {figure}": f"{value:.3f} ± {found.ci95:.3f}" if figure == "sampled" else f"{value:.3f}"
            for stage, found in run.stages.items()
            for figure, value in (("sampled", found.sampled), ("greedy", found.greedy))
        }
        lines.append({"run": run.name, **cells, "wall_s": f"{run.wall_s:.0f}"})
    if len(runs) > 1:
        lines += _over_seeds(runs)
    return lines


def _over_seeds(runs: Sequence[DemoRun]) -> list[dict[str, object]]:
    mean: dict[str, object] = {"run": "mean"}
    deviation: dict[str, object] = {"run": "sd"}
    for stage in runs[0].stages:
        for figure in ("sampled", "greedy"):
            values = [float(getattr(run.stages[stage], figure)) for run in runs]
            of_all = mean_and_sd(values)
            mean[f"{stage} {figure}"], deviation[f"{stage} {figure}"] = (f"{value:.3f}" for value in of_all)
    walls = mean_and_sd([run.wall_s for run in runs])
    mean["wall_s"], deviation["wall_s"] = (f"{value:.0f}" for value in walls)
    return [mean, deviation]


def play_demo(name: str, folder: Path, settings: Sequence[str], *, keep: bool) -> DemoRun:
    """Runs the demo in a process of its own; with `keep`, a run that is complete already is only read."""
    run = folder / name
    summary = run / "summary.json"
    if not (keep and summary.exists()):
        run_child(
            "treadle.workflows.cli",
            ["run", "demo", *settings, "--json", "--fresh", "--dir", str(run)],
            log=folder / f"{name}.log",
            deadline_s=RUN_DEADLINE_S,
            OMP_NUM_THREADS="1",
        )
    return DemoRun.of(name, json.loads(summary.read_text()))


def show(runs: Sequence[DemoRun]) -> None:
    """Prints the runs as a table."""
    stages = [stage for stage in STAGES if stage in runs[0].stages]
    columns = [f"{stage} {figure}" for stage in stages for figure in ("sampled", "greedy")]
    print(table(lines_of(runs), ["run", *columns, "wall_s"]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--dir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce/reproduce.json"))
    parser.add_argument("--keep", action="store_true", help="do not repeat runs that are complete")
    parser.add_argument(
        "--set", dest="settings", nargs="*", default=[], help="settings for all runs: key=value"
    )
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in given.seeds:
        settings = [f"seed={seed}", *given.settings]
        runs.append(play_demo(f"seed-{seed}", given.dir, settings, keep=given.keep))
        show(runs[-1:])
    shuffled = [
        f"seed={given.seeds[0]}",
        "stages.grpo.shuffle_rewards=true",
        "~stages.student",
        "~stages.export",
    ]
    control = play_demo(CONTROL, given.dir, [*shuffled, *given.settings], keep=given.keep)
    broken = [*(problem for run in runs for problem in broken_bounds(run)), *broken_control(control)]
    print(f"\n{hardware()}")
    show(runs)
    print("\nshuffled rewards, before (sft) and after (grpo):")
    show([control])
    report = {
        "hardware": hardware(),
        "runs": [asdict(run) for run in runs],
        "control": asdict(control),
        "broken": broken,
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {given.out}")
    for problem in broken:
        print(f"MISSED  {problem}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
