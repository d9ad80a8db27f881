"""How much of a step η=2 hides: the demo's GRPO with staleness 2 against 0, each with every role real.

    python -m tests.benchmarks.bench_overlap [--quick] [--out bench.json]

`generate` are the seconds of a step in which at least one group was being drawn, `learn` those in which the learner
stepped or its weights were published. wall / max(generate, learn) is 1 when the shorter of the two is hidden
altogether, and (generate + learn) / max(generate, learn), plus verification, when nothing is. On two cores
both sides compete for the same cores, which lengthens both; so the wall time over that of η=0 is shown too.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks.bench_rows import Row, append_rows, compared, hardware, run_child, spread, table
from tests.benchmarks.bench_step import START_DEADLINE_S
from tests.benchmarks.step_loads import DEMO, prepare
from tests.benchmarks.step_ours import StepRun

COMMAND = "python -m tests.benchmarks.bench_overlap"
ETA = 2
STEPS, QUICK_STEPS, WARM_STEPS = 40, 6, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Medians of a run, in seconds per step."""

    wall_s: float
    generate_s: float
    learn_s: float

    @property
    def ratio(self) -> float:
        """wall / max(generate, learn)."""
        return self.wall_s / max(self.generate_s, self.learn_s)


def overlap(run: StepRun) -> Overlap:
    """Means, because with η>0 the sides' seconds belong to no single step."""
    return Overlap(
        wall_s=statistics.fmean(run.step_s),
        generate_s=statistics.fmean(run.generating_s),
        learn_s=statistics.fmean(run.learning_s),
    )


def overlap_rows(free: StepRun, bound: StepRun) -> list[Row]:
    """η=2 (`free`) against η=0 (`bound`). Raises `ValueError` if a group was staler than allowed."""
    if free.staleness_max > ETA or bound.staleness_max > 0:
        raise ValueError(
            f"measured staleness {free.staleness_max} at η={ETA} and {bound.staleness_max} at η=0 exceeds the bound"
        )
    a, b = overlap(free), overlap(bound)
    detail = (
        f"η={ETA}: generate {a.generate_s:.3f} s, learn {a.learn_s:.3f} s, largest staleness {free.staleness_max:.0f}; "
        f"η=0: generate {b.generate_s:.3f} s, learn {b.learn_s:.3f} s"
    )
    return [
        compared(
            f"overlap: wall / max(generate, learn), η={ETA} (ours) and η=0 (theirs)",
            a.ratio,
            b.ratio,
            "1 is complete overlap",
            command=COMMAND,
            detail=detail,
        ),
        compared(
            f"overlap: step at η={ETA} (ours) and η=0 (theirs)",
            a.wall_s,
            b.wall_s,
            "s per step",
            command=COMMAND,
            detail=detail,
        ),
    ]


def run_with(eta: int, folder: Path, steps: int) -> StepRun:
    """One run of the demo's GRPO stage in a process of its own."""
    out = folder / f"eta-{eta}.json"
    run_child(
        "tests.benchmarks.step_ours",
        [
            *("--load", DEMO.name, "--folder", str(folder), "--out", str(out)),
            *("--warm", str(WARM_STEPS), "--steps", str(steps), f"stages.grpo.staleness={eta}"),
        ],
        log=out.with_suffix(".log"),
        deadline_s=START_DEADLINE_S + (WARM_STEPS + steps) * DEMO.step_deadline_s,
        OMP_NUM_THREADS="1",
    )
    return StepRun.read(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="models, runs and logs")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    given = parser.parse_args()
    folder = given.folder.resolve() / DEMO.name
    prepare(DEMO, folder)
    steps = QUICK_STEPS if given.quick else STEPS
    bound, free = run_with(0, folder, steps), run_with(ETA, folder, steps)
    for eta, run in ((0, bound), (ETA, free)):
        print(
            f"η={eta}: {spread(run.step_s)} s per step, largest staleness {run.staleness_max:.0f}, {overlap(run)}"
        )
    rows = overlap_rows(free, bound)
    append_rows(given.out, rows)
    print(hardware())
    print(table([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
