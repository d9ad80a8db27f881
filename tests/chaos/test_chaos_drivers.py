"""Rows 7, 11, 16, 21 and 30: the driver dies, processes freeze, answers come twice, the run is of a newer version."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from tests.chaos.book import Row, write_row
from tests.chaos.runs import PATIENT, WHOLE_RUN, Chaos, account, clean, first_step_after, same_bits
from tests.e2e.programs import (
    TINY,
    WITH_PROMPTS,
    Ended,
    Program,
    patiently,
    samples_of,
    wait_until,
)

from treadle.platform.errors import LedgerError
from treadle.platform.ledger import Ledger
from treadle.platform.mirror import Mirror

pytestmark = WHOLE_RUN

COMMIT = Path("checkpoints/rl/step-00000002/COMMITTED")
POINTS = (
    "driver.after_shards",
    "checkpoint.before_manifest",
    "checkpoint.before_marker",
    "mirror.before_manifest",
    "mirror.before_commit",
)


def test_row_07_the_driver_is_killed_and_the_run_resumed(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    program, ended = patiently(
        *("run", str(TINY), WITH_PROMPTS, "--dir", str(folder)),
        TREADLE_FAILPOINTS="driver.after_publish=kill@3",
    )
    assert ended.code == -signal.SIGKILL, ended
    assert program.all_but_agents_gone(), program.survivors()
    resumed = time.time()
    _, ended = patiently("resume", str(folder))
    assert ended.code == 0, ended
    found = account(folder)
    write_row(
        Row(
            row=7,
            fault="kill -9 of the driver, then treadle resume: from the command to the first step",
            seconds=[first_step_after(folder, resumed)],
            account=found,
            same_bits=same_bits(folder, undisturbed),
        )
    )
    assert clean(found), found
    assert same_bits(folder, undisturbed)
    assert samples_of(folder) == samples_of(undisturbed)


def test_row_11_frozen_processes_are_replaced_and_do_no_harm_when_they_wake(
    tmp_path: Path, undisturbed: Path
) -> None:
    """Of a rollout worker and a rank; a frozen driver: tests/e2e/test_take_over.py."""
    (tmp_path / "once").mkdir()
    folder = tmp_path / "run"
    deadlines = tuple(
        f"{role}.{setting}"
        for role in ("rollout", "learner")
        for setting in ("silence_deadline_s=4", "heartbeat_s=0.5")
    )
    program = Program(
        words=("run", str(TINY), WITH_PROMPTS, *PATIENT, *deadlines, "--dir", str(folder)),
        environment={
            "TREADLE_FAILPOINTS": "rollout.mid_generation=freeze@9;learner.before_step[1]=freeze@3",
            "TREADLE_FAILPOINTS_ONCE": str(tmp_path / "once"),
        },
    )
    process = program.start()
    try:
        zombies = [
            woken_when_replaced(tmp_path / "once", folder, process.pid, kind)
            for kind in ("replaced", "recovery")
        ]
        out, err = process.communicate(timeout=900)
    except BaseException:
        process.kill()
        raise
    assert process.returncode == 0, (out, err)
    assert program.all_gone(), program.survivors()
    happened = {file.name: file.stat().st_mtime for file in (tmp_path / "once").iterdir()}
    chaos = Chaos(folder=folder, ended=Ended(code=0, out=out, err=err, wall_s=0.0), faults=happened)
    found = account(folder)
    write_row(
        Row(
            row=11,
            fault="a frozen worker and a frozen rank, and SIGCONT after their successors came",
            seconds=chaos.steps_resumed_s(),
            budget_s=10.0,
            account=found,
            same_bits=same_bits(folder, undisturbed),
            figures={"woken": sum(zombies), "writes accepted from zombies": found.doubled},
        )
    )
    assert clean(found), found
    assert same_bits(folder, undisturbed)
    assert samples_of(folder) == samples_of(undisturbed)


def woken_when_replaced(once: Path, folder: Path, driver: int, kind: str) -> bool:
    """Waits for the successor, then wakes the process that was frozen for this kind of event; whether there was still
    one to wake."""
    point = {"replaced": "rollout", "recovery": "learner"}[kind]

    def happened() -> bool:
        events = folder / "events.jsonl"
        return not psutil.pid_exists(driver) or (events.exists() and f'"kind":"{kind}"' in events.read_text())

    assert wait_until(lambda: any(point in file.name for file in once.iterdir()), 600)
    assert wait_until(happened, 300)
    [label] = [file for file in once.iterdir() if point in file.name]
    try:
        os.kill(int(label.read_text()), signal.SIGCONT)
    except ProcessLookupError:
        return False
    return True


def test_row_16_a_driver_that_dies_in_a_commit_leaves_nothing_that_is_loaded(
    tmp_path: Path, undisturbed: Path
) -> None:
    """Nor do uploads to the mirror."""
    folder, url = tmp_path / "run", str(tmp_path / "mirror")
    command: tuple[str, ...] = ("run", str(TINY), WITH_PROMPTS, f"checkpoint.mirror={url}")
    command = (*command, "--dir", str(folder))
    mirror, seconds, orphaned = Mirror(url, timeout_s=10), [], 0
    for point in POINTS:
        program, ended = patiently(*command, TREADLE_FAILPOINTS=f"{point}=kill@1")
        assert ended.code == -signal.SIGKILL, (point, ended)
        # A worker that is being started when everything around it dies ends when it finds nobody to connect to.
        assert program.all_but_agents_gone(within_s=90), program.survivors()
        committed = (folder / COMMIT).exists()
        assert committed == point.startswith("mirror."), point
        if not committed:
            torn = [file for file in (folder / COMMIT).parent.rglob("*") if file.is_file()]
            orphaned += sum(file.stat().st_size for file in torn)
        assert mirror.commits() == [], point
        command = ("resume", str(folder))
    orphaned += sum(mirror.store.files("data").values())
    resumed = time.time()
    _, ended = patiently(*command)
    assert ended.code == 0, ended
    seconds.append(first_step_after(folder, resumed))
    found = account(folder)
    write_row(
        Row(
            row=16,
            fault="the driver dies between shards, manifest and marker, three times here, twice in the mirror",
            seconds=seconds,
            account=found,
            same_bits=same_bits(folder, undisturbed),
            figures={"bytes written and never loaded": orphaned, "of them left in the mirror": left(mirror)},
        )
    )
    assert clean(found), found
    assert same_bits(folder, undisturbed)
    assert orphaned > 0
    assert left(mirror) == 0
    assert mirror.commits()[-1].step == 6


def left(mirror: Mirror) -> int:
    """Bytes in the mirror that no commit needs."""
    commits = mirror.commits()
    needed = {file.path for commit in commits for file in mirror.manifest(commit).values()}
    needed |= {commit.manifest for commit in commits}
    return sum(size for name, size in mirror.store.files("data").items() if f"data/{name}" not in needed)


def test_row_21_what_is_delivered_twice_or_out_of_order_counts_once(tmp_path: Path) -> None:
    refused = 0
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        ids = [f"rl/{number:08d}" for number in range(4)]
        for group in ids:
            ledger.issue(group, "p", 0)
        for group in (ids[1], ids[0]):  # answers come in any order
            ledger.drawn(group, 0, 0, 8)
            ledger.scored(group, scored=4, failed=0, timed_out=0)
        ledger.lease(ids[:2], 0)
        ledger.trained("rl", 0)
        replays = (
            lambda: ledger.issue(ids[0], "p", 0),
            lambda: ledger.drawn(ids[0], 0, 0, 8),
            lambda: ledger.scored(ids[0], scored=4, failed=0, timed_out=0),
            lambda: ledger.lease(ids[:2], 0),
            lambda: ledger.lease(ids[:2], 1),
            lambda: ledger.lease(ids[2:], 1),  # not drawn yet
            lambda: ledger.drop(ids[:1], "again"),
        )
        for replay in replays:
            with pytest.raises(LedgerError):
                replay()
            refused += 1
        audit = ledger.audit()
    write_row(
        Row(
            row=21,
            fault="deliveries repeated and out of order",
            figures={"refused": refused, "trained twice": 0},
        )
    )
    assert (audit.trained, audit.doubled, audit.lost, audit.in_flight) == (2, 0, 0, 2)


def test_row_30_a_run_of_another_version_is_refused_and_left_as_it_is(
    tmp_path: Path, undisturbed: Path
) -> None:
    newer = tmp_path / "run"
    shutil.copytree(undisturbed, newer)
    (newer / "summary.json").unlink()
    with closing(sqlite3.connect(newer / "ledger.sqlite")) as ledger:
        ledger.execute("PRAGMA user_version = 99")
    before = {
        path: path.read_bytes()
        for path in newer.rglob("*")
        if path.is_file() and path.suffix == ".safetensors"
    }
    set_state(newer, "killed")
    ended = Program(words=("resume", str(newer))).run()
    write_row(Row(row=30, fault="the ledger is of a newer version", figures={"exit code": ended.code}))
    assert ended.code != 0
    assert "ledger format 99, this version reads 1" in ended.complaint
    assert {path: path.read_bytes() for path in before} == before


def set_state(folder: Path, state: str) -> None:
    told = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**told, "state": state}))
