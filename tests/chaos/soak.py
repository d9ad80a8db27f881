"""Half an hour of faults: python -m tests.chaos.soak [--minutes 30] [--seed 1] [--out soak.json]

One run of the tiny recipe, with calm windows, storms outside the learner and storms over all roles in turns, so that a
machine that changes speed changes all three. In a storm a process is killed or frozen every 20 to 30 s. Throughput
retained is groups trained per second (those that a rollback undid do not count) in storms over that in calm windows.
At the end the ledger is checked. Exit code 1 where an invariant is broken or the run ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks.bench_rows import hardware
from tests.e2e.programs import TINY, TREADLE, WITH_PROMPTS, Program, wait_until

from treadle.platform.errors import LedgerError, StorageError
from treadle.platform.ledger import Ledger
from treadle.platform.rollcall import ENV_ROLL
from treadle.workflows.gamedays.account import account, events_of, percentile
from treadle.workflows.gamedays.cast import Cast, strike
from treadle.workflows.gamedays.plan import ACTIONS

CALM_S, STORM_S = 45.0, 180.0
SETTINGS = (
    "stages.rl.steps=1000000",
    "checkpoint.every_steps=20",
    "checkpoint.keep=2",
    "tracking.rollouts_every=20",
    "rollout.silence_deadline_s=4",
    "rollout.heartbeat_s=0.5",
    "learner.silence_deadline_s=6",
    "recovery.max_recoveries=100000",
    "recovery.same_step=1000",
    "rollout.max_restarts=100000",
    "broadcast.max_restarts=100000",
    "verify.respawns=100000",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to a process of a role, and how often it is chosen."""

    role: str
    action: str
    weight: int

    @property
    def name(self) -> str:
        return f"{self.role}: {self.action}"


OUTSIDE = (
    Fault(role="rollout", action="kill", weight=3),
    Fault(role="rollout", action="freeze", weight=1),
    Fault(role="verify", action="kill", weight=2),
    Fault(role="verifier", action="kill", weight=2),
    Fault(role="verifier", action="freeze", weight=1),
    Fault(role="broadcast", action="kill", weight=2),
)
LEARNER = (Fault(role="learner", action="kill", weight=3), Fault(role="learner", action="freeze", weight=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A stretch of the run. `groups` were trained in it and not undone in it."""

    kind: str
    seconds: float
    groups: int
    faults: tuple[str, ...]

    @property
    def rate(self) -> float:
        return self.groups / self.seconds


class Soak:
    """The run and whoever disturbs it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self._random = random.Random(seed)
        self._begun = False
        words = ("run", str(TINY), WITH_PROMPTS, *SETTINGS, "--dir", str(folder))
        self._cast = Cast(folder.parent / "roll")
        self._program = Program(words=words, environment={ENV_ROLL: str(self._cast.roll)})
        self._log = (folder.parent / "soak.log").open("w+")
        self._process = subprocess.Popen(
            [str(TREADLE), *words],
            env=self._program.surroundings(),
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def begin(self) -> None:
        """Waits for the first steps. Raises `RuntimeError` where none come."""
        if not wait_until(lambda: self.trained() > 30 or not self.alive(), 600) or not self.alive():
            raise RuntimeError(f"the run did not begin: {self.said()}")
        self._begun = True

    def alive(self) -> bool:
        return self._process.poll() is None

    def said(self) -> str:
        """The end of what the run has printed."""
        self._log.flush()
        return Path(self._log.name).read_text()[-2000:]

    def trained(self) -> int:
        """Groups that are trained in the surviving lineage."""
        try:
            with Ledger.open(self.folder / "ledger.sqlite", read_only=True) as ledger:
                return ledger.audit().trained
        except (StorageError, LedgerError):
            if self._begun:
                raise
            return 0  # it is not there yet, or half made

    def window(self, kind: str, seconds: float, faults: Sequence[Fault]) -> Window:
        """Lets the run go on, disturbed by `faults`; a last one has at least 20 s to be mended in the window."""
        began, before, happened = time.monotonic(), self.trained(), []
        until = began + seconds
        while self.alive() and (left := until - time.monotonic()) > 0:
            pause = self._random.uniform(20.0, 30.0)
            if not faults or left < pause:
                time.sleep(min(left, 1.0) if self.alive() else 0)
                continue
            if name := self._strike(faults):
                happened.append(name)
            time.sleep(pause)
        took = time.monotonic() - began
        return Window(kind=kind, seconds=took, groups=self.trained() - before, faults=tuple(happened))

    def _strike(self, faults: Sequence[Fault]) -> str:
        [fault] = self._random.choices(faults, [fault.weight for fault in faults])
        found = self._cast.of(fault.role)
        return fault.name if found and strike(self._random.choice(found), ACTIONS[fault.action]) else ""

    def end(self) -> int:
        """Ctrl-C. Returns the number of processes that are left after it."""
        if self.alive():
            os.killpg(self._process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(120)
        self._program.all_gone()
        left = len(self._program.survivors())
        self._process.kill()
        self._process.wait()
        self._log.close()
        return left


def retained(windows: Sequence[Window], kind: str) -> float:
    """Median rate of the storms of a kind over that of the calm windows."""
    storms = [window.rate for window in windows if window.kind == kind]
    calm = [window.rate for window in windows if window.kind == "calm"]
    return statistics.median(storms) / statistics.median(calm) if storms and calm else float("nan")


def verdict(folder: Path, windows: Sequence[Window], left: int, alive: bool) -> dict[str, object]:
    """The figures, and the broken invariants by name."""
    with Ledger.open(folder / "ledger.sqlite", read_only=True) as ledger:
        audit = ledger.audit()
    counts = {**asdict(account(folder)), "processes left": left}
    del counts["issued"]
    seconds = [float(e["seconds"]) for kind in ("replaced", "recovery") for e in events_of(folder, kind)]
    return {
        "faults": sum(len(window.faults) for window in windows),
        "by_fault": dict(Counter(name for window in windows for name in window.faults)),
        "throughput_retained_outside_the_learner": round(retained(windows, "outside"), 4),
        "throughput_retained_over_all_roles": round(retained(windows, "all"), 4),
        "trained_groups": audit.trained,
        "replaced_p50_s": percentile(seconds, 0.5),
        "replaced_p95_s": percentile(seconds, 0.95),
        **counts,
        "broken": [name for name, count in counts.items() if count] + ([] if alive else ["the run ended"]),
        "hardware": hardware(),
        "windows": [{**asdict(window), "rate": round(window.rate, 2)} for window in windows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    given = parser.parse_args()
    # Where a shell has put this into the background it ignores Ctrl-C, and so would the run that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="treadle-soak-") as parent:
        soak = Soak(Path(parent) / "run", given.seed)
        windows: list[Window] = []
        try:
            soak.begin()
            until = time.monotonic() + given.minutes * 60
            turns = (("calm", CALM_S, ()), ("outside", STORM_S, OUTSIDE), ("all", STORM_S, OUTSIDE + LEARNER))
            while time.monotonic() < until and soak.alive():
                for kind, seconds, faults in turns:
                    windows.append(
                        soak.window(kind, min(seconds, max(1.0, until - time.monotonic())), faults)
                    )
                    last = windows[-1]
                    print(f"{kind:8} {last.rate:7.2f} groups/s  {', '.join(last.faults)}", flush=True)
            alive = soak.alive()
        finally:
            said = soak.said()
            left = soak.end()
        told = verdict(soak.folder, windows, left, alive)
    given.out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps({key: value for key, value in told.items() if key != "windows"}, indent=1))
    if told["broken"]:
        sys.exit(f"broken: {told['broken']}\n{said}")


if __name__ == "__main__":
    main()
