"""Following and stopping a run that another process makes, from its folder."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from treadle.platform.errors import (
    ConfigError,
    DeadlineError,
    Interrupted,
    LearnerError,
    RoleError,
    TreadleError,
)
from treadle.platform.records import Outcome
from treadle.platform.tracking import Redactor, RunTracker, TrackingConfig
from treadle.workflows import onlooking
from treadle.workflows.folder import RunFolder
from treadle.workflows.onlooking import follow_process, stop_run
from treadle.workflows.outcomes import as_json, conclude, error_of, outcome_of
from treadle.workflows.stopping import STOP_FILE


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs a run, as far as anybody can see."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        yield started
        started.kill()


@pytest.fixture
def folder(tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(onlooking, "LOOK_S", 0.02)
    made = RunFolder(tmp_path)
    made.set_state(state="running", attempts=1, pid=process.pid)
    return made


def later(act: object, after_s: float = 0.2) -> None:
    threading.Timer(after_s, act).start()  # type: ignore[arg-type]


def test_a_run_is_followed_to_its_end_with_its_error(folder: RunFolder) -> None:
    tracker, shown = (
        RunTracker(folder.path, TrackingConfig(mlflow="off"), name="t", stream=io.StringIO()),
        io.StringIO(),
    )

    def end() -> None:
        tracker.say("rank 1 died")
        told = outcome_of(LearnerError("learner.step 3: rank 1 died.", "Resume it."))
        tracker.close("failed")
        folder.set_state(state="failed", error=as_json(told, Redactor()))

    later(end)
    with pytest.raises(LearnerError, match=r"learner.step 3: rank 1 died\. Resume it\."):
        follow_process(folder, shown)
    assert shown.getvalue().splitlines()[0] == "rank 1 died"
    assert shown.getvalue().splitlines()[-1].startswith("run failed after")


def test_a_run_whose_process_vanishes_is_not_waited_for(
    folder: RunFolder, process: subprocess.Popen[bytes]
) -> None:
    def end() -> None:
        process.kill()
        process.wait()

    later(end)
    with pytest.raises(RoleError, match=f"process {process.pid} is gone without a word.*treadle resume"):
        follow_process(folder, io.StringIO())


def test_a_run_of_another_machine_that_falls_silent_is_not_waited_for(folder: RunFolder) -> None:
    folder.set_state(host="elsewhere", pid=1 << 30, started_unix_s=time.time() - 500)
    roles = folder.path / "roles.json"
    roles.write_text("{}")
    os.utime(roles, (time.time() - 400, time.time() - 400))
    with pytest.raises(DeadlineError, match=r"on elsewhere has written nothing for 40\d s.*--take-over"):
        follow_process(folder, io.StringIO())
    os.utime(roles, (time.time() - 200, time.time() - 200))
    later(lambda: folder.set_state(state="finished"))
    follow_process(folder, io.StringIO())
    os.utime(
        roles, (time.time() - 800, time.time() - 800)
    )  # of an earlier attempt: this one is still starting
    folder.set_state(state="running")
    later(lambda: folder.set_state(state="finished"))
    follow_process(folder, io.StringIO())


def test_a_stop_waits_for_the_runs_own_word(folder: RunFolder) -> None:
    said = Outcome(kind="Interrupted", message="Stopped on request.", remedy="Resume it.", exit_code=130)
    later(lambda: folder.set_state(state="interrupted", error=asdict(said)))
    assert stop_run(folder, 5.0) == f"{folder.path}: Stopped on request. Resume it."
    asked = json.loads((folder.path / STOP_FILE).read_text())
    assert (asked["attempt"], asked["deadline_s"]) == (1, 5.0)


def test_a_stop_of_what_does_not_run_is_answered_at_once(
    folder: RunFolder, process: subprocess.Popen[bytes]
) -> None:
    process.kill()
    process.wait()
    assert "is gone without a word; nothing runs" in stop_run(folder, 60.0)
    folder.set_state(state="finished")
    assert stop_run(folder, 60.0) == f"{folder.path}: finished; nothing runs."


def test_a_run_that_does_not_stop_is_an_error_that_names_its_process(
    folder: RunFolder, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onlooking, "GRACE_S", 0.2)
    with pytest.raises(DeadlineError, match=f"process {process.pid} on .* has not ended within 0.3 s"):
        stop_run(folder, 0.1)
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    began = time.monotonic()
    with pytest.raises(DeadlineError, match="it is frozen"):
        stop_run(folder, 60.0)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("a=1 cannot be.", "Use 2."),
        Interrupted("Stopped."),
        LearnerError("learner: gone.", "Look."),
        TreadleError("What?"),
    ],
)
def test_an_error_comes_back_as_it_was(error: TreadleError) -> None:
    again = error_of(outcome_of(error))
    assert (type(again), str(again), again.exit_code) == (type(error), str(error), error.exit_code)


def test_a_defect_and_an_error_of_a_newer_version_come_back_as_errors(folder: RunFolder) -> None:
    again = error_of(outcome_of(KeyError("no such\nkey")))
    assert type(again) is TreadleError
    assert "A defect ended the run: KeyError: 'no such" in str(again)
    assert type(error_of(Outcome(kind="annotations", message="x", exit_code=1))) is TreadleError
    assert type(error_of(Outcome(kind="FutureError", message="x", exit_code=7))) is TreadleError
    folder.set_state(
        state="failed", error=as_json(outcome_of(TreadleError("token=hunter2hunter2")), Redactor())
    )
    assert "hunter2" not in (folder.path / "run.json").read_text()
    with pytest.raises(TreadleError):
        conclude(folder)


def test_what_has_finished_concludes_well_and_what_was_killed_does_not(folder: RunFolder) -> None:
    folder.set_state(state="finished")
    conclude(folder)
    folder.set_state(state="interrupted", error=None)
    with pytest.raises(RoleError, match=r"nobody runs it.*treadle resume"):
        conclude(folder)
