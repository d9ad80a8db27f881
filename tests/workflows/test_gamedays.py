"""Game days: what a plan may say, who is struck, and what the account finds."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from treadle.platform.errors import ConfigError
from treadle.platform.failpoints import ENV_FILE, Faults, read_faults
from treadle.platform.ledger import Ledger
from treadle.platform.rollcall import ENV_ROLL, called, enlist
from treadle.platform.tracking import RunTracker, TrackingConfig
from treadle.workflows.folder import RunFolder, write_json
from treadle.workflows.gamedays.account import Account, Recoveries, account, clean
from treadle.workflows.gamedays.cast import Cast, strike
from treadle.workflows.gamedays.command import chaos, tell
from treadle.workflows.gamedays.conductor import Played, Steps, Struck
from treadle.workflows.gamedays.plan import Plan, Pointed, Timed, read_plan
from treadle.workflows.recipe import load_recipe

GOOD = """\
# Monday
faults:
  - rollout.before_draw[sum-12]@3: kill
  - rollout.before_draw[sum-12]@5: "sleep:0.5"
  - driver.after_lease: kill
  - {at_step: 3, role: learner, which: 1, action: freeze, for_s: 2.5}
  - {at_s: 40, role: verify, action: kill}
check: [lost, doubled]
deadline_s: 60
"""


def plan_of(folder: Path, text: str) -> Plan:
    (folder / "plan.yaml").write_text(text)
    return read_plan(folder / "plan.yaml")


def test_a_plan_is_read_with_its_lines_and_orders_its_failpoints(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, GOOD)
    assert [type(fault) for fault in plan.faults] == [Pointed] * 3 + [Timed] * 2
    assert [fault.where.rpartition(":")[2] for fault in plan.faults] == ["3", "4", "5", "6", "7"]
    assert [fault.role for fault in plan.faults] == ["rollout", "rollout", "driver", "learner", "verify"]
    assert plan.timed[0].text == "at step 3: freeze learner 1 for 2.5 s"
    assert (plan.check, plan.deadline_s) == (("lost", "doubled"), 60)
    (tmp_path / "faults.json").write_text(json.dumps(plan.orders()))
    ordered = read_faults({ENV_FILE: str(tmp_path / "faults.json")})
    assert isinstance(ordered, Faults)
    assert len(ordered) == 3
    assert plan.orders()["rollout.before_draw[sum-12]"] == ["kill@3", "sleep:0.5@5"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("rollout.before_drew@3: kill", "plan.yaml:2: failpoint .*Did you mean 'rollout.before_draw'"),
        ("rollout.before_draw@0: kill", "plan.yaml:2: .*@0 is no passage"),
        ("rollout.before_draw@2: explode", "plan.yaml:2: .*unknown action 'explode'"),
        ("rollout.before_draw: kill@2", "plan.yaml:2: .*the passage belongs to the failpoint"),
        ("learner.before_step: corrupt", "plan.yaml:2: there is nothing to corrupt at learner.before_step"),
        ("driver.after_lease@*: kill", "plan.yaml:2: .*would end every driver"),
        ("kill", "plan.yaml:2: 'kill' is no fault"),
        ("{at_s: 3, at_step: 3, role: verify, action: kill}", "plan.yaml:2: .*Give one of the two"),
        ("{role: verify, action: kill}", "plan.yaml:2: .*at_s or at_step"),
        ("{at_s: 3, role: verifyer, action: kill}", "plan.yaml:2: role='verifyer'.*Did you mean 'verifier'"),
        ("{at_s: 3, role: verify, action: stop}", "plan.yaml:2: action='stop'"),
        ("{at_s: soon, role: verify, action: kill}", "plan.yaml:2: at_s='soon' is no number"),
        ("{at_step: 1.5, role: verify, action: kill}", "plan.yaml:2: at_step=1.5 is no count"),
        ("{at_s: 1, role: verify, action: kill, for_s: 3}", "plan.yaml:2: for_s=3 goes with freeze"),
        ("{at_s: 1, roll: verify, action: kill}", "plan.yaml:2: roll: unknown key. Did you mean 'role'"),
        (
            "rollout.before_draw: kill\n  - rollout.before_draw@1: kill",
            r"plan.yaml:3: .*ordered at .*plan.yaml:2",
        ),
        ("rollout.before_draw: kill\ncheck: [lots]", "plan.yaml:3: check: 'lots' is no invariant"),
        ("rollout.before_draw: kill\ndeadline: 3", "plan.yaml:3: deadline: unknown key"),
        ("rollout.before_draw: kill\ndeadline_s: 0", "plan.yaml:3: deadline_s=0"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_of(tmp_path, f"faults:\n  - {line}\n")


@pytest.mark.parametrize("text", ["faults: []", "faults: kill", "check: [lost]"])
def test_a_plan_without_faults_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="at least one fault"):
        plan_of(tmp_path, text)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{at_s: 1, role: rollout, which: 7, action: kill}", "no rollout 7; the recipe has rollout.workers="),
        ("{at_step: 90000, role: driver, action: kill}", "never followed by another"),
        ("learner.before_step[9]: kill", r"learner.before_step\[9\] is nobody in this recipe"),
    ],
)
def test_a_plan_that_does_not_fit_the_recipe_is_refused(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "plan.yaml").write_text(f"faults:\n  - {line}\n")
    with pytest.raises(ConfigError, match=said):
        played(tmp_path, "demo")


def played(folder: Path, recipe: str, *, dry_run: bool = False) -> dict[str, object]:
    return chaos(
        *(recipe, folder / "plan.yaml", [], folder / "run", "", None),
        fresh=False,
        dry_run=dry_run,
        as_json=True,
    )


@pytest.mark.processes
def test_a_dry_run_lists_the_faults_and_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("faults:\n  - rollout.before_draw@3: kill\n")
    assert played(tmp_path, "demo", dry_run=True)["faults"] == ["rollout.before_draw@3: kill"]
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
def test_a_second_game_day_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("faults:\n  - rollout.before_draw@3: kill\n")
    (tmp_path / "run" / "chaos").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds a game day already"):
        played(tmp_path, "demo")


SLEEPER = "import time; time.sleep(600)"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", SLEEPER]) as process:
        yield process
        process.kill()


def note(roll: Path, name: str, pid: int, host: str = socket.gethostname()) -> None:
    roll.mkdir(exist_ok=True)
    (roll / name).write_text(json.dumps({"pid": pid, "host": host}))


def test_a_process_notes_itself_where_it_is_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_ROLL, raising=False)
    enlist("rollout-0")
    assert called(tmp_path / "roll") == {}
    monkeypatch.setenv(ENV_ROLL, str(tmp_path / "roll"))
    note(tmp_path / "roll", "rollout-0", 1)
    enlist("rollout-0")
    [found] = called(tmp_path / "roll").values()
    assert (found.name, found.pid, found.host) == ("rollout-0", os.getpid(), socket.gethostname())


def test_the_cast_finds_processes_by_role_and_number(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    cast = Cast(tmp_path / "roll")
    assert cast.one("learner", 1) is None
    note(cast.roll, "learner-1", sleeper.pid)
    note(cast.roll, "learner-0", sleeper.pid, host="elsewhere")
    assert [process.pid for process in cast.of("learner")] == [sleeper.pid]
    assert cast.one("learner", 0) is None
    assert cast.elsewhere("learner", 0) == "elsewhere"
    process = cast.one("learner", 1)
    assert process is not None
    assert strike(process, signal.SIGSTOP)
    os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
    assert cast.one("learner", 1) is None, "a frozen process is no victim"
    assert strike(process, signal.SIGKILL)
    sleeper.wait(timeout=30)
    assert cast.one("learner", 1) is None
    assert not strike(process, signal.SIGKILL)


def test_another_process_with_the_id_of_one_that_is_gone_is_not_struck(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    cast = Cast(tmp_path / "roll")
    note(cast.roll, "rollout-0", sleeper.pid)
    before = psutil.Process(sleeper.pid).create_time() - 60
    os.utime(cast.roll / "rollout-0", (before, before))
    assert cast.of("rollout") == []


def test_steps_are_counted_once_however_often_they_are_made(tmp_path: Path) -> None:
    tracker = RunTracker(tmp_path, TrackingConfig(mlflow="off"), name="t", json_mode=True)
    stage, steps = tracker.stage("rl", total_steps=9), Steps(tmp_path / "metrics.jsonl")
    assert steps.made() == 0
    for number in (0, 1, 1, 2):
        stage.log(number, {"reward/mean": 0.5})
    tracker.settle()
    assert steps.made() == 3
    stage.log(3, {"reward/mean": 0.5})
    tracker.close()
    assert steps.made() == 4


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run of the demo's recipe with six trained groups in two steps."""
    folder = RunFolder.of(tmp_path / "run", load_recipe("demo"))
    with Ledger.open(folder.ledger) as ledger:
        for number in range(6):
            step, id = number // 3, f"grpo/{number:08d}"
            ledger.issue(id, "p", step)
            ledger.drawn(id, step, step, 8)
            ledger.scored(id, scored=4, failed=0, timed_out=0)
            ledger.lease([id], step)
            if number % 3 == 2:
                ledger.trained("grpo", step)
    tracker = RunTracker(folder.path, TrackingConfig(mlflow="off"), name="t", json_mode=True)
    tracker.stage("grpo", total_steps=10).log(1, {"reward/mean": 0.25})
    tracker.close()
    folder.set_state(state="finished")
    write_json(folder.summary, {"weights_digest": "abc"})
    return folder


def forge(run: RunFolder, statement: str) -> None:
    with closing(sqlite3.connect(run.ledger)) as db, db:
        db.execute(statement)


CLEAN = Account(issued=6, lost=0, doubled=0, mixed=0, stale=0, poisoned=0)


def test_a_clean_run_has_a_clean_account(run: RunFolder) -> None:
    assert account(run.path) == CLEAN
    assert clean(CLEAN)


@pytest.mark.parametrize(
    ("statement", "broken"),
    [
        ("UPDATE groups SET newest = 7 WHERE number = 2", "mixed"),
        ("UPDATE groups SET oldest = 0, newest = 0 WHERE number = 5", "stale"),
        ("DELETE FROM groups WHERE number = 3", "lost"),
        ("UPDATE groups SET state = 'leased' WHERE number = 3", "lost"),
        (
            "INSERT INTO history SELECT NULL, id, event, before, step, incarnation, reason, unix_s FROM history",
            "doubled",
        ),
    ],
)
def test_what_the_ledger_gives_away_is_in_the_account(run: RunFolder, statement: str, broken: str) -> None:
    forge(run, statement)
    found = account(run.path)
    assert not clean(found)
    assert getattr(found, broken) > 0
    told = tell(Plan(name="p", faults=(), check=(broken,)), ended(), run, None)
    assert told["broken"] == [broken]


def ended(*, code: int = 0, zombies: tuple[int, ...] = (), **changes: object) -> Played:
    plain = {"drivers": 1, "struck": {}, "missed": {}, "timed_out": False, "wall_s": 9.0}
    return Played(code=code, zombies=zombies, **{**plain, **changes})  # type: ignore[arg-type]


def test_weights_with_a_nan_are_poisoned(run: RunFolder) -> None:
    run.artifact("grpo").mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.tensor([1.0, float("nan")])}, run.artifact("grpo") / "model.safetensors")
    assert account(run.path).poisoned == 1


def test_groups_in_flight_of_a_run_that_can_be_continued_are_not_lost(run: RunFolder) -> None:
    forge(run, "UPDATE groups SET state = 'leased' WHERE number = 5")
    assert account(run.path).lost == 1
    run.set_state(state="interrupted")
    assert account(run.path).lost == 0


def test_the_account_tells_what_struck_what_did_not_and_what_is_broken(
    run: RunFolder, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, GOOD)
    told = tell(plan, ended(struck={0: Struck(at=time.time() - 3600, pid=7)}, missed={3: "gone"}), run, None)
    struck, *others = told["faults"]
    assert struck["struck"]
    assert struck["recovered_by"] == "next step"
    assert [fault["struck"] for fault in others] == [False] * 4
    assert [fault["why"] for fault in others] == [
        "no process passed rollout.before_draw of sum-12 for the 5th time",
        "no process passed driver.after_lease",
        "gone",
        "the run was over before",
    ]
    assert told["broken"] == []
    assert "4 of 5 faults were not struck" in told["text"]
    assert "all invariants hold" in told["text"]


def test_a_run_that_fails_differs_or_lets_a_zombie_through_is_broken(run: RunFolder, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, GOOD)
    failed = tell(plan, ended(code=1), run, None)
    assert failed["broken"] == ["finished"]
    assert "its driver ended with code 1" in failed["text"]
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    write_json(other.summary, {"weights_digest": "xyz"})
    assert tell(plan, ended(), run, other.path)["broken"] == ["same digest"]
    write_json(other.summary, {"weights_digest": "abc"})
    assert tell(plan, ended(), run, other.path)["broken"] == []
    assert tell(plan, ended(zombies=(1, 0)), run, None)["broken"] == ["fencing"]
    assert tell(plan, ended(zombies=(1,)), run, None)["broken"] == []


def test_a_recovery_is_the_successor_the_new_ranks_or_the_next_step() -> None:
    known = Recoveries(
        replaced=((12.0, "rollout"), (15.0, "coordinator")), rolled_back=(20.0,), steps=(5.0, 11.0, 30.0)
    )
    assert known.after("rollout", 10.0, ended=True) == (2.0, "successor")
    assert known.after("rollout", 10.0, ended=False) == (1.0, "next step")
    assert known.after("broadcast", 10.0, ended=True) == (5.0, "successor")
    assert known.after("learner", 10.0, ended=True) == (10.0, "new ranks")
    assert known.after("driver", 12.0, ended=True) == (18.0, "next step")
    assert known.after("driver", 31.0, ended=True) is None
