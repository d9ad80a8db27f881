"""A driver that was frozen and replaced writes nothing more when it wakes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from tests.e2e.programs import (
    TINY,
    WITH_PROMPTS,
    Ended,
    Program,
    patiently,
    samples_of,
    summary_of,
    wait_until,
)

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.slow, pytest.mark.timeout(3600)]

FROZEN_AFTER = Path("checkpoints/rl/step-00000002/COMMITTED")


def contents(folder: Path) -> dict[str, str]:
    """What the run says of itself; logs are of processes, not of the run. Of the ledger its rows: the last process to
    close it tidies the file."""
    files = [path for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts]
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not path.name.startswith("ledger.sqlite")
    }
    with closing(sqlite3.connect(f"file:{folder / 'ledger.sqlite'}?mode=ro", uri=True)) as ledger:
        return found | {"ledger": "\n".join(ledger.iterdump())}


def lingering(folder: Path) -> bool:
    """Whether `treadle status` says who is stuck, where and since when."""
    said = json.loads(Program(words=("status", str(folder), "--json")).run().out)["now"]
    return (
        bool(said)
        and (said["driver"]["stage"], said["driver"]["doing"]) == ("rl", "learn")
        and said["driver"]["for_s"] > 1
        and any(doing.startswith("opening references") for doing in said["roles"].values())
    )


def test_a_frozen_driver_is_replaced_and_writes_nothing_when_it_wakes(
    tmp_path: Path, undisturbed: Path
) -> None:
    folder = tmp_path / "run"
    zombie = Program(words=("run", str(TINY), WITH_PROMPTS, "--dir", str(folder)))
    process = zombie.start()
    try:
        assert wait_until(lambda: (folder / FROZEN_AFTER).exists() or process.poll() is not None, 900)
        assert process.poll() is None, process.communicate()
        os.kill(process.pid, signal.SIGSTOP)
        _, ended = patiently("resume", str(folder))
        assert ended.code == 0, ended
        before = contents(folder)
        os.kill(process.pid, signal.SIGCONT)
        out, err = process.communicate(timeout=300)
    except BaseException:
        process.kill()
        raise
    woken = Ended(code=process.returncode, out=out, err=err, wall_s=0.0)
    assert woken.code == 1
    assert "writer 1, writer 2 has taken over" in woken.complaint
    assert contents(folder) == before, "a zombie wrote"
    assert zombie.all_gone(), zombie.survivors()
    assert summary_of(folder)["weights_digest"] == summary_of(undisturbed)["weights_digest"]
    assert samples_of(folder) == samples_of(undisturbed)
    assert summary_of(folder)["samples"]["doubled"] == summary_of(folder)["samples"]["lost"] == 0


def test_a_run_that_somebody_runs_is_refused_and_says_what_it_is_doing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = Program(
        words=("run", str(TINY), WITH_PROMPTS, "--dir", str(folder)),
        environment={"TREADLE_FAILPOINTS": "learner.before_step=sleep:500@1"},
    )
    process = first.start()
    try:
        assert wait_until(lambda: (folder / "roles.json").exists() or process.poll() is not None, 900)
        assert wait_until(lambda: lingering(folder), 300), Program(words=("status", str(folder))).run().out
        refused = Program(words=("resume", str(folder))).run()
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=300)
    except BaseException:
        process.kill()
        raise
    assert refused.code == 2
    assert f"is being run by process {process.pid}" in refused.complaint
    assert "--take-over" in refused.complaint
    assert first.all_gone(), first.survivors()
