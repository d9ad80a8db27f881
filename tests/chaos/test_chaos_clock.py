"""Row 22: the wall clock of every process jumps by an hour, back and forth, in the middle of a run."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest
from tests.benchmarks.bench_outage import points
from tests.chaos.book import Row, write_row
from tests.chaos.runs import WHOLE_RUN, account, clean, same_bits, struck
from tests.e2e.buckets import MIRRORED
from tests.e2e.programs import Program, samples_of, summary_of, wait_until

pytestmark = [*WHOLE_RUN, pytest.mark.mlflow]

HOUR_S = 3600
JUMPS_S = (HOUR_S, -2 * HOUR_S, HOUR_S)
"""One after the other: an hour ahead, an hour behind, right again."""
NOTICED_S = 12.0
LONGEST_S = 600.0
"""No figure in seconds of this run is near it, unless it was taken from the wall clock."""


class SetClock:
    """The clock of all processes that run with `environment`; Ray's own, too."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        assert compiler, "a C compiler is needed, as for Treadle itself"
        library, file = folder / "wall_clock.so", folder / "clock"
        source = Path(__file__).with_name("wall_clock.c")
        subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True
        )
        file.write_bytes(bytes(8))
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), 8)
        self._ahead_s = 0
        self.library = library
        self.environment = {"LD_PRELOAD": str(library), "TREADLE_TEST_CLOCK": str(file)}

    def jump(self, seconds: int) -> None:
        self._ahead_s += seconds
        self._map[:8] = struct.pack("=q", self._ahead_s * 10**9)


def with_that_clock(program: Program, library: Path) -> Counter[str]:
    """The run's processes that have the library mapped, by what they are."""
    found: Counter[str] = Counter()
    for line in program.survivors():
        process = psutil.Process(int(line.split()[0]))
        if any(region.path == str(library) for region in process.memory_maps()):
            found[
                process.cmdline()[0].partition(":")[2].strip(":").split("(")[0].split(".")[0] or "other"
            ] += 1
    return found


def test_the_clock_of_the_test_is_set_for_whoever_preloads_it(tmp_path: Path) -> None:
    clock = SetClock(tmp_path)
    clock.jump(HOUR_S)
    asked = "import time; print(time.time(), time.monotonic())"
    answer = subprocess.check_output([sys.executable, "-c", asked], env={**os.environ, **clock.environment})
    wall, monotonic = map(float, answer.split())
    import time

    assert abs(wall - time.time() - HOUR_S) < 60
    assert abs(monotonic - time.monotonic()) < 60


def test_row_22_the_wall_clock_jumps_by_an_hour_and_nobody_is_late(tmp_path: Path, undisturbed: Path) -> None:
    clock, seen = SetClock(tmp_path), Counter[str]()
    folder = tmp_path / "run"

    def told() -> int:
        return (folder / "events.jsonl").read_text().count('"kind":"clock_set"')

    def strike(program: Program) -> None:
        seen.update(with_that_clock(program, clock.library))
        for at, seconds in enumerate(JUMPS_S, 1):
            clock.jump(seconds)
            assert wait_until(lambda at=at: told() >= at, NOTICED_S), "the jump was not noticed"

    chaos = struck(
        tmp_path,
        strike,
        "tracking.mlflow=auto",
        f"{MIRRORED}{tmp_path / 'mirror'}",
        environment={**clock.environment, "TREADLE_FAILPOINTS": "learner.before_step[1]=sleep:6@*"},
    )
    found, summary = account(chaos.folder), summary_of(chaos.folder)
    lines = [json.loads(line) for line in (chaos.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [b["time"] - a["time"] for a, b in itertools.pairwise(lines)]
    wanted = Counter((key, line["step"]) for line in lines for key in line["metrics"])
    there = points(chaos.folder / "mlflow.db")
    seconds = [
        value
        for line in lines
        for key, value in line["metrics"].items()
        if key.startswith("timing_s/") or key.endswith("_s")
    ]
    jumps = [round(event["seconds"]) for event in chaos.events("clock_set")]
    write_row(
        Row(
            row=22,
            fault="the wall clock of all processes jumps: an hour ahead, two behind, one ahead",
            account=found,
            same_bits=same_bits(chaos.folder, undisturbed),
            figures={
                "jumps noticed": len(jumps),
                "spurious timeouts": sum(summary["replacements"].values())
                + summary["recoveries"]
                + summary["samples"]["timed_out"],
                "processes with that clock": sum(seen.values()),
                "metrics": wanted.total(),
                "metrics missing in MLflow": (wanted - there).total(),
                "metrics twice in MLflow": (there - wanted).total(),
                "longest time told by a metric s": round(max(seconds), 1),
            },
        )
    )
    assert clean(found), found
    assert jumps == list(JUMPS_S)
    assert max(steps) > HOUR_S - 60, "the clock of the metrics did not jump"
    assert same_bits(chaos.folder, undisturbed)
    assert samples_of(chaos.folder) == samples_of(undisturbed)
    assert (summary["replacements"], summary["recoveries"], summary["samples"]["timed_out"]) == ({}, 0, 0)
    assert {"RolloutActor", "LearnerRankActor", "VerifyActor", "CoordinatorActor"} <= set(seen), seen
    assert wanted == there
    assert min(seconds) >= 0
    assert max(seconds) < LONGEST_S
    assert summary["mirror"]["complete"]
