"""What the tests of hostile programs share: sandboxes by tier, and what a program has left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

from treadle.actors.verify.programs.cases import Test
from treadle.actors.verify.programs.languages import toolchain
from treadle.actors.verify.programs.launcher import FIRST_UID
from treadle.actors.verify.programs.local import LocalSandbox
from treadle.actors.verify.programs.records import MIB
from treadle.actors.verify.programs.submission import Budget, Result, Submission

STRONG = ("bubblewrap", "landlock")
BUDGET = Budget(
    time_limit_s=1.0, compile_limit_s=4.0, total_s=10.0, memory_bytes=256 * MIB, output_bytes=65536
)
SLACK_S = 1.0
"""How long after its time a hostile program may still occupy the judge."""
JUDGE_MEMORY_BYTES = 64 * MIB
"""How much more memory the judge may use at its peak than before a hostile program ran."""


@dataclass
class Watched:
    """What judging one program has cost."""

    results: list[Result] = field(default_factory=list)
    wall_s: float = 0.0
    memory_bytes: int = 0
    left_behind: list[str] = field(default_factory=list)

    @property
    def details(self) -> str:
        return "; ".join(result.detail for result in self.results)


@contextmanager
def watched(sandbox: LocalSandbox) -> Iterator[Watched]:
    """Times the block and looks for processes that it leaves."""
    seen = Watched()
    before, memory_bytes = set(strangers(sandbox)), _peak_bytes(reset=True)
    began_s = time.monotonic()
    yield seen
    seen.wall_s = time.monotonic() - began_s
    seen.memory_bytes = _peak_bytes() - memory_bytes
    seen.left_behind = sorted(set(strangers(sandbox)) - before)


def judged(
    sandbox: LocalSandbox,
    language: str,
    code: str,
    tests: list[Test],
    budget: Budget = BUDGET,
    stop_at_failure: bool = True,
) -> Watched:
    with watched(sandbox) as seen:
        submission = Submission(sandbox, toolchain(language), code, budget)
        seen.results = submission.results(tests, stop_at_failure=stop_at_failure)
    return seen


def assert_contained(seen: Watched, within_s: float = BUDGET.time_limit_s) -> None:
    assert seen.left_behind == []
    assert seen.wall_s < within_s + SLACK_S
    assert seen.memory_bytes < JUDGE_MEMORY_BYTES


def strangers(sandbox: LocalSandbox) -> Iterator[str]:
    """Living processes that could be a program's: those of the launcher's user for programs, where it has
    one, or else of this user and not of this session; and all beneath the launcher."""
    launcher = sandbox.launcher_pid or 0
    ours = psutil.Process().pid
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE or process.pid in (launcher, ours):
                continue
            of_program = (
                process.uids().real == FIRST_UID + launcher if os.getuid() == 0 else _like_ours(process)
            )
            if of_program or launcher in (parent.pid for parent in process.parents()):
                yield f"{process.pid} {process.cmdline()}"
        except psutil.Error:
            continue


def _like_ours(process: psutil.Process) -> bool:
    return process.uids().real == os.getuid() and os.getsid(process.pid) != os.getsid(0)


def _peak_bytes(reset: bool = False) -> int:
    """The most resident memory this process has had since the last reset."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024
