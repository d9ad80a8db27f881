"""Runs with faults ordered at failpoints, and what their ledger, samples and weights say afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.programs import TINY, WITH_PROMPTS, Ended, Program, patiently, wait_until

from treadle.workflows.gamedays.account import (
    Account,
    Recoveries,
    account,
    clean,
    digest_of,
    events_of,
    not_finite,
)

__all__ = ["Account", "account", "clean", "events_of", "not_finite"]
WHOLE_RUN = [
    pytest.mark.chaos,
    pytest.mark.ray,
    pytest.mark.deepspeed,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]
"""Marks of every test here."""
COMMIT = "checkpoints/rl/step-00000002/COMMITTED"
"""The first commit of the tiny recipe."""
PATIENT = (
    "recovery.max_recoveries=40",
    "rollout.max_restarts=40",
    "broadcast.max_restarts=40",
    "verify.respawns=40",
)
"""The suite is a restart storm; what caps storms has tests of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chaos:
    """A run that has ended, and when each of its faults happened (Unix seconds, by the fault's label)."""

    folder: Path
    ended: Ended
    faults: dict[str, float]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Fields of all events of a kind, with their time."""
        return events_of(self.folder, kind)

    def recoveries_s(self, role: str) -> list[float]:
        """From each fault to the end of the replacement that came after it."""
        known = Recoveries.of(self.folder)
        found = (known.after(role, at, ended=True) for at in self.faults.values())
        return [seconds for seconds, sign in filter(None, found) if sign != "next step"]

    def metrics(self, name: str) -> list[float]:
        """A figure of every step that has it."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line["metrics"][name] for line in lines if name in line["metrics"]]

    def times(self) -> list[float]:
        """When each step was made (Unix seconds), redone ones included."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return sorted(line["time"] for line in lines)

    def steps_resumed_s(self) -> list[float]:
        """From each fault to the next step that was made, redone work included."""
        known = Recoveries.of(self.folder)
        found = (known.after("driver", at, ended=True) for at in self.faults.values())
        return [seconds for seconds, _ in filter(None, found)]


def chaotic(
    folder: Path,
    *faults: str,
    settings: tuple[str, ...] = (),
    once: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Chaos:
    """A run of the tiny recipe in which each fault happens once in all processes together (or, with `once` off, in
    every process that gets to it). The run must end well, and so must all of its processes."""
    told = folder / "once"
    told.mkdir(parents=True)
    around = dict(environment or {})
    if faults:
        around["TREADLE_FAILPOINTS"] = ";".join(faults)
    if once:
        around["TREADLE_FAILPOINTS_ONCE"] = str(told)
    words = ("run", str(TINY), WITH_PROMPTS, *PATIENT, *settings, "--dir", str(folder / "run"))
    program, ended = patiently(*words, **around)
    assert ended.code == 0, ended
    assert program.all_gone(), program.survivors()
    happened = {file.name: file.stat().st_mtime for file in told.iterdir()}
    assert not once or len(happened) == len(faults), f"ordered {faults}, happened {sorted(happened)}"
    return Chaos(folder=folder / "run", ended=ended, faults=happened)


def struck(
    folder: Path,
    strike: Callable[[Program], None],
    *settings: str,
    environment: Mapping[str, str] | None = None,
    when: str = COMMIT,
) -> Chaos:
    """A run of the tiny recipe to which `strike` happens once the file `when` is in its folder. The run must end well,
    and so must all of its processes."""
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "run"
    words = ("run", str(TINY), WITH_PROMPTS, *PATIENT, *settings, "--dir", str(run))
    program, began = Program(words=words, environment=environment or {}), time.monotonic()
    with (folder / "said.log").open("w+") as log:
        process = program.start_into(log)
        try:
            assert wait_until(lambda: (run / when).exists() or process.poll() is not None, 900)
            struck_s = time.time()
            if process.poll() is None:
                strike(program)
            code = process.wait(900)
        except BaseException:
            process.kill()
            raise
        said = (folder / "said.log").read_text()
    ended = Ended(code=code, out=said, err=said, wall_s=time.monotonic() - began)
    assert ended.code == 0, ended
    assert program.all_gone(), program.survivors()
    return Chaos(folder=run, ended=ended, faults={"strike": struck_s})


def first_step_after(folder: Path, since: float) -> float:
    """Seconds from a moment (Unix) to the first step that was made after it."""
    return min(time for time in Recoveries.of(folder).steps if time > since) - since


def same_bits(folder: Path, undisturbed: Path) -> bool:
    return digest_of(folder) == digest_of(undisturbed)
