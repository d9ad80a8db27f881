"""MLflow goes away in several ways: nothing is lost, nothing is there twice, and the run says so."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.platform.faulty_mlflow import Fault, FaultyMlflow, faulty_mlflow

from treadle.platform.tracking import RunTracker, TrackingConfig, read_events, unsent
from treadle.platform.tracking.feed import load_state
from treadle.platform.tracking.outages import MAX_FEEDERS

pytestmark = [pytest.mark.mlflow, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FaultyMlflow, Path]]:
    """The server behind its proxy, and the server's database."""
    folder = tmp_path_factory.mktemp("server")
    with faulty_mlflow(folder) as server:
        yield server, folder / "server.db"


def points(database: Path, run_id: str) -> dict[tuple[str, int], int]:
    """How often each (metric, step) of a run is in the database."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as store:
        rows = store.execute(
            "SELECT key, step, COUNT(*) FROM metrics WHERE run_uuid = ? GROUP BY 1, 2", (run_id,)
        )
        return {(key, step): count for key, step, count in rows}


def tracked(folder: Path, uri: str) -> RunTracker:
    config = TrackingConfig(mlflow=uri, experiment=folder.name, drain_s=120)
    return RunTracker(folder, config, json_mode=True)


def await_state(tracker: RunTracker, error: bool) -> None:
    """Looks as the driver does, until the feeder says that MLflow is away, or that all is sent."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(0.2)
        tracker.look_at_mlflow()
        state = load_state(tracker.run_dir)
        if bool(state.error) == error and (error or not unsent(tracker.run_dir).lines):
            return
    raise AssertionError((load_state(tracker.run_dir), unsent(tracker.run_dir)))


@pytest.mark.parametrize("fault", [Fault.STOPPED, Fault.SLOW, Fault.ERROR, Fault.UNAUTHORIZED, Fault.GATEWAY])
def test_no_outage_loses_or_doubles_a_metric_and_each_is_told(
    tmp_path: Path, mlflow: tuple[FaultyMlflow, Path], fault: Fault
) -> None:
    server, database = mlflow
    tracker = tracked(tmp_path / fault.name, server.uri)
    stage = tracker.stage("grpo", total_steps=20)
    stage.log(0, {"reward/mean": 0.0})
    await_state(tracker, error=False)
    server.set(fault)
    for step in range(1, 10):
        stage.log(step, {"reward/mean": step / 20, "policy/loss": float("nan")})
    await_state(tracker, error=True)
    assert tracker.mlflow is not None
    assert "KiB wait" in tracker.mlflow.doing
    server.set(Fault.NONE)
    for step in range(10, 20):
        stage.log(step, {"reward/mean": step / 20})
    await_state(tracker, error=False)
    assert tracker.mlflow.doing == ""
    assert tracker.mlflow.outages == 1
    stage.close()
    tracker.close()
    assert tracker.unsent is not None
    assert (tracker.unsent.lines, tracker.unsent.rejected, tracker.unsent.error) == (0, 0, "")
    sent = points(database, load_state(tracker.run_dir).stage_run_ids["grpo"])
    expected = {("reward/mean", step) for step in range(20)} | {
        ("policy/loss", step) for step in range(1, 10)
    }
    assert sent == dict.fromkeys(expected, 1)
    told = [event.kind for event in read_events(tracker.run_dir) if event.kind.startswith("mlflow_")]
    assert told == ["mlflow_away", "mlflow_back"]


def test_a_feeder_that_dies_is_started_again_and_one_that_keeps_dying_is_not(tmp_path: Path) -> None:
    tracker = tracked(tmp_path / "run", f"sqlite:///{tmp_path / 'store.db'}")
    tracker.log(0, {"reward/mean": 0.5})
    mlflow = tracker.mlflow
    assert mlflow is not None
    for _ in range(MAX_FEEDERS - 1):
        os.kill(mlflow.feed.pid, signal.SIGKILL)
        while not mlflow.feed.ended:
            time.sleep(0.05)
        tracker.look_at_mlflow()
        assert not mlflow.feed.ended
    assert mlflow.feeders == MAX_FEEDERS
    tracker.close()
    assert tracker.unsent is not None
    assert tracker.unsent.lines == 0
    replaced = [event.fields for event in read_events(tracker.run_dir) if event.kind == "replaced"]
    assert [one["role"] for one in replaced] == ["mlflow"] * (MAX_FEEDERS - 1)
    assert "code -9" in str(replaced[0]["message"])

    tracker = tracked(tmp_path / "run", f"sqlite:///{tmp_path / 'store.db'}")
    mlflow = tracker.mlflow
    assert mlflow is not None
    mlflow.feeders = MAX_FEEDERS
    os.kill(mlflow.feed.pid, signal.SIGKILL)
    while not mlflow.feed.ended:
        time.sleep(0.05)
    tracker.look_at_mlflow()
    assert mlflow.feed.ended
    assert mlflow.doing == "its feeder is gone"
    tracker.close()
    assert json.loads((tmp_path / "run" / "mlflow.json").read_text())["error"] == ""
