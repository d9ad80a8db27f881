"""Runs a recipe as a program of its own, disturbs it as planned, and continues it where the plan ended its driver."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from treadle.platform.failpoints import ENV, ENV_FILE, ENV_ONCE
from treadle.platform.processes import die_with
from treadle.platform.rollcall import ENV_ROLL
from treadle.platform.tracking.spool import METRICS_FILE, read_lines
from treadle.workflows.folder import CHAOS, RunFolder
from treadle.workflows.gamedays.cast import Cast, strike
from treadle.workflows.gamedays.plan import ACTIONS, Plan, Timed

_TICK_S = 0.1
SAID = "said.log"
_LEAVE_S = 120.0
"""For a run that was told to stop, and for a driver that wakes after it was replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """When a fault happened (Unix seconds), and to which process."""

    at: float
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """How the game day went. `struck` has the faults that happened, by their place in the plan; `missed` says of the
    others why, where that is known; `zombies` are the exit codes of drivers that woke after they were replaced."""

    code: int
    drivers: int
    struck: Mapping[int, Struck]
    missed: Mapping[int, str]
    zombies: Sequence[int]
    timed_out: bool
    wall_s: float


@dataclass(slots=True)
class _Sleeper:
    """A process that was frozen and is to be woken."""

    process: psutil.Process
    until: float


@dataclass(slots=True)
class Steps:
    """How many steps a run has made, redone ones counted once; reads what is new in its metrics."""

    file: Path
    _offset: int = 0
    _seen: set[tuple[object, object]] = field(default_factory=set)

    def made(self) -> int:
        if self.file.exists() and self.file.stat().st_size < self._offset:
            self._offset = 0
        lines = read_lines(self.file, self._offset)
        self._offset = lines.next_offset
        self._seen.update((line.get("stage"), line.get("step")) for line in lines.records)
        return len(self._seen)


class Conductor:
    """One game day. `words` are the arguments of `treadle run` in the folder `folder`; `quiet` keeps what it prints in
    `chaos/said.log` there.

    consumes: the run's notes, steps and exit codes; waits for: the next fault that is due, or the run's end; unblocked
    by: them, or the plan's deadline; produces: signals, and drivers that continue the run.
    """

    def __init__(self, plan: Plan, words: Sequence[str], folder: Path, *, quiet: bool) -> None:
        self._plan, self._words, self._folder = plan, (*words, f"--dir={folder}"), folder
        self._ordered = folder.resolve() / CHAOS
        self._cast = Cast(self._ordered / "roll")
        self._steps = Steps(folder / METRICS_FILE)
        self._struck: dict[int, Struck] = {}
        self._missed: dict[int, str] = {}
        self._sleepers: list[_Sleeper] = []
        self._zombies: list[subprocess.Popen[str]] = []
        self._drivers = 0
        self._prepare()
        self._log = (self._ordered / SAID).open("w") if quiet else None

    def play(self) -> Played:
        """Plays it to its end. Whatever ends this call, no driver is left behind."""
        began, timed_out = time.monotonic(), False
        driver = self._start("run", *self._words)
        try:
            while True:
                passed_s = time.monotonic() - began
                if passed_s > self._plan.deadline_s:
                    timed_out = True
                    break
                self._wake()
                if driver.poll() is not None:
                    if driver.returncode == 0 or driver.pid not in self._victims():
                        break
                    driver = self._continued()
                elif self._abandoned(driver):
                    self._zombies.append(driver)
                    driver = self._continued()
                else:
                    self._strike(driver, passed_s)
                    time.sleep(_TICK_S)
        finally:
            _stop(driver)
            woken = [_woken(zombie) for zombie in self._zombies]
            if self._log is not None:
                self._log.close()
        self._read_orders()
        return Played(
            code=driver.returncode,
            drivers=self._drivers,
            struck=self._struck,
            missed=self._missed,
            zombies=woken,
            timed_out=timed_out,
            wall_s=time.monotonic() - began,
        )

    def _prepare(self) -> None:
        self._ordered.mkdir(parents=True)
        if self._plan.name:
            shutil.copyfile(self._plan.name, self._ordered / "plan.yaml")
        (self._ordered / "faults.json").write_text(json.dumps(self._plan.orders(), indent=1) + "\n")
        (self._ordered / "struck").mkdir()

    def _start(self, *words: str) -> subprocess.Popen[str]:
        self._drivers += 1
        faults = {ENV_FILE: str(self._ordered / "faults.json"), ENV_ONCE: str(self._ordered / "struck")}
        around = {name: value for name, value in os.environ.items() if name != ENV}
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "treadle.workflows.cli", *words],
            env={**around, **faults, ENV_ROLL: str(self._ordered / "roll")},
            stdout=self._log,
            stderr=self._log,
            text=True,
            start_new_session=True,  # a Ctrl-C is passed on once, below
            preexec_fn=functools.partial(die_with, os.getpid()),  # noqa: PLW1509  it must not outlive us
        )

    def _continued(self) -> subprocess.Popen[str]:
        """The next driver; from the beginning where the one before had not got so far that there is a run."""
        if RunFolder(self._folder).config.exists():
            return self._start("resume", str(self._folder))
        return self._start("run", *self._words)

    def _read_orders(self) -> None:
        """The failpoints that have struck: each leaves a file with the process's id."""
        for number, fault in enumerate(self._plan.faults):
            if isinstance(fault, Timed) or number in self._struck:
                continue
            note = self._ordered / "struck" / fault.fault.label
            if note.exists() and (pid := note.read_text()):
                self._struck[number] = Struck(at=note.stat().st_mtime, pid=int(pid))

    def _victims(self) -> set[int]:
        self._read_orders()
        return {struck.pid for struck in self._struck.values()}

    def _abandoned(self, driver: subprocess.Popen[str]) -> bool:
        """Whether the driver is frozen for good, and another one should take the run over."""
        with contextlib.suppress(psutil.Error):
            frozen = psutil.Process(driver.pid).status() == psutil.STATUS_STOPPED
            return frozen and all(sleeper.process.pid != driver.pid for sleeper in self._sleepers)
        return False

    def _strike(self, driver: subprocess.Popen[str], passed_s: float) -> None:
        steps = self._steps.made() if any(fault.at_step is not None for fault in self._plan.timed) else 0
        for number, fault in enumerate(self._plan.faults):
            if isinstance(fault, Timed) and number not in self._struck:
                due = passed_s >= fault.at_s if fault.at_s is not None else steps >= (fault.at_step or 0)
                if due:
                    self._strike_one(number, fault, driver)

    def _strike_one(self, number: int, fault: Timed, driver: subprocess.Popen[str]) -> None:
        """One that is being replaced is struck as soon as its successor is there."""
        of_driver = fault.role == "driver"
        target = psutil.Process(driver.pid) if of_driver else self._cast.one(fault.role, fault.which)
        if target is None:
            host = self._cast.elsewhere(fault.role, fault.which)
            where = f"runs on {host}, where only failpoints reach it" if host else "was not there"
            self._missed[number] = f"{fault.role} {fault.which} {where}"
            return
        at = time.time()
        if strike(target, ACTIONS[fault.action]):
            self._missed.pop(number, None)
            self._struck[number] = Struck(at=at, pid=target.pid)
            if fault.for_s:
                self._sleepers.append(_Sleeper(target, time.monotonic() + fault.for_s))

    def _wake(self) -> None:
        """Those whose time has come, unless their run has given them up by then."""
        now = time.monotonic()
        for sleeper in [sleeper for sleeper in self._sleepers if sleeper.until <= now]:
            strike(sleeper.process, signal.SIGCONT)
            self._sleepers.remove(sleeper)


def _stop(driver: subprocess.Popen[str]) -> None:
    """Ends a driver that still runs, as Ctrl-C does; one that does not end by that is killed."""
    if driver.poll() is None:
        driver.send_signal(signal.SIGCONT)
        driver.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(_LEAVE_S)
    driver.kill()
    driver.wait()


def _woken(zombie: subprocess.Popen[str]) -> int:
    """Wakes a driver that has a successor. It finds out by itself; returns how it ended."""
    zombie.send_signal(signal.SIGCONT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return zombie.wait(_LEAVE_S)
    zombie.kill()
    return zombie.wait()
