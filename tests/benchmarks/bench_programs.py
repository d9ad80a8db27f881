"""The price of a sandbox: programs judged in each tier against the same commands as plain processes.

    python -m tests.benchmarks.bench_programs [--quick] [--out bench.json]

One program with five tests, as calls (one process for all five) and as inputs (a process each), and one in C
(compiled, then five processes). The plain side starts the same commands with the same files by `subprocess.run` in a
folder and isolates nothing. Both sides take turns, one program at a time, in one process.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks.bench_rows import Row, append_rows, compared, spread, table

from treadle.actors.verify.programs.cases import CallTest, StdinTest, Test
from treadle.actors.verify.programs.languages import toolchain
from treadle.actors.verify.programs.records import Command, Ended, Reason, Sandbox, SandboxError
from treadle.actors.verify.programs.submission import Budget, Submission
from treadle.actors.verify.programs.tiers import make_local

COMMAND = "python -m tests.benchmarks.bench_programs"
TIERS = ("bubblewrap", "landlock", "gvisor")
CALLS: list[Test] = [CallTest(function="square", args=(n,), returns=n * n) for n in range(5)]
INPUTS: list[Test] = [StdinTest(stdin=f"{n}\n", stdout=f"{n * n}\n") for n in range(5)]
LOADS: dict[str, tuple[str, str, list[Test]]] = {
    "Python, five calls": ("python", "def square(n):\n    return n * n\n", CALLS),
    "Python, five inputs": ("python", "print(int(input()) ** 2)\n", INPUTS),
    "C, five inputs": (
        "c",
        '#include <stdio.h>\nint main(void) { int n; scanf("%d", &n); printf("%d\\n", n * n); }\n',
        INPUTS,
    ),
}


class Plain:
    """What a sandbox is compared with: implements `Sandbox` and protects from nothing."""

    tier = "plain processes"

    def run(self, command: Command) -> Ended:
        began_s = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for name, content in command.files.items():
                path = Path(folder, name)
                path.write_bytes(content)
                path.chmod(0o755)
            ended = subprocess.run(
                command.argv,
                input=command.stdin,
                cwd=folder,
                capture_output=True,
                timeout=command.limits.wall_s,
                check=False,
            )
        wall_s = time.monotonic() - began_s
        return Ended(
            reason=Reason.EXITED,
            exit_code=ended.returncode,
            signal=None,
            stdout=ended.stdout,
            stderr=ended.stderr,
            wall_s=wall_s,
            cpu_s=wall_s,
        )

    def close(self) -> None:
        """Nothing is kept."""


def turn(sandbox: Sandbox, load: str, programs: int) -> float:
    """Programs judged per second."""
    language, code, tests = LOADS[load]
    tools = toolchain(language)
    began_s = time.monotonic()
    for _ in range(programs):
        budget = Budget(time_limit_s=10.0, compile_limit_s=20.0, total_s=60.0)
        results = Submission(sandbox, tools, code, budget).results(tests, stop_at_failure=True)
        assert [result.passed for result in results] == [True] * len(tests)
    return programs / (time.monotonic() - began_s)


def measured(tier: str, load: str, rounds: int, programs: int) -> Row:
    """Both sides in turns, the first turn of each left out. Raises `SandboxError` where the tier is missing."""
    ours, theirs = [], []
    plain, sandbox = Plain(), make_local(tier)
    try:
        for _ in range(rounds + 1):
            ours.append(turn(sandbox, load, programs))
            theirs.append(turn(plain, load, programs))
    finally:
        sandbox.close()
    print(f"{load}: {sandbox.tier} {spread(ours[1:])}, plain {spread(theirs[1:])} programs per second")
    return compared(
        f"programs: {load}, {tier}",
        statistics.median(ours[1:]),
        statistics.median(theirs[1:]),
        "programs per second (ratio: what the sandbox leaves of the plain rate)",
        command=COMMAND,
        detail=f"{sandbox.tier}; medians of {rounds} turns of {programs} programs, one at a time",
    )


def all_rows(tiers: Sequence[str], rounds: int, programs: int) -> list[Row]:
    """A row per tier and load; tiers that this machine lacks are named and left out."""
    rows = []
    for tier in tiers:
        few = max(2, programs // 5) if tier == "gvisor" else programs  # it takes ten times as long
        for load in LOADS:
            try:
                rows.append(measured(tier, load, rounds, few))
            except SandboxError as error:
                print(f"{tier}: left out: {error.message}")
                break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    given = parser.parse_args()
    rows = all_rows(TIERS, *((1, 3) if given.quick else (3, 10)))
    append_rows(given.out, rows)
    print(table([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
