"""The feed against real MLflow: a SQLite file, a server that goes away, a driver that dies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.platform.faulty_mlflow import free_port, mlflow_server

from treadle.platform.errors import StorageError
from treadle.platform.tracking import RolloutRow, RunTracker, TrackingConfig, sync, unsent
from treadle.platform.tracking.feed import STATE_FILE, FeedState, load_state, save_state

pytestmark = [pytest.mark.mlflow, pytest.mark.slow]

SETTINGS: dict[str, Any] = {
    "seed": 7,
    "grpo": {"lr": 2e-4, "max_new_tokens": 28, "steps": 30},
    "storage": {"secret": "canary-1b2c3d4e5f"},
    "note": "x" * 9000,
}


def _rollout(index: int, status: str = "scored") -> RolloutRow:
    return RolloutRow(
        group_id="grpo/17", prompt_id="addition-47+85", prompt="47+85=", sample_index=index,
        completion="<think>7+5=12</think><answer>132</answer>", thinking="7+5=12", answer="132",
        reward=1.1 if status == "scored" else float("nan"), parts={"accuracy": 1.0, "format": 0.1},
        status=status, detail="" if status == "scored" else "no answer within 2 s", verifier="exact/1",
        version_oldest=16, version_newest=17, length_tokens=21, stop="eos", worker="rollout-0",
        generate_s=0.2, verify_s=0.002,
    )  # fmt: skip


def _track(folder: Path, uri: str, steps: range, *, stage: str = "grpo", **settings: Any) -> RunTracker:
    config = TrackingConfig(mlflow=uri, experiment="tests", rollouts_every=10, drain_s=120)
    run = RunTracker(folder, config, name="demo", settings={**SETTINGS, **settings}, json_mode=True)
    tracker = run.stage(stage, total_steps=30)
    for step in steps:
        tracker.log(step, {"reward/mean": step / 30, "policy/entropy": 1.0, "odd name@%": float("nan")})
        tracker.rollouts(step, [_rollout(0), _rollout(1, "timed_out")])
    tracker.close()
    return run


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _steps(client: Any, run_id: str, metric: str = "reward/mean") -> list[int]:
    return sorted(point.step for point in client.get_metric_history(run_id, metric))


def test_a_run_arrives_in_sqlite_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "run"
    run = _track(folder, "auto", range(25))
    run.stage("sft", total_steps=3).log(0, {"policy/loss": 2.0})
    run.close()
    assert run.unsent is not None
    assert (run.unsent.lines, run.unsent.rejected, run.unsent.error) == (0, 0, "")

    state = load_state(folder)
    client = _client(f"sqlite:///{folder / 'mlflow.db'}")
    parent = client.get_run(state.parent_run_id)
    child = client.get_run(state.stage_run_ids["grpo"])
    assert parent.info.run_name == "demo"
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert child.data.tags["mlflow.parentRunId"] == state.parent_run_id
    assert set(state.stage_run_ids) == {"grpo", "sft"}
    assert (child.data.tags["treadle.stage"], child.data.tags["treadle.attempt"]) == ("grpo", "1")
    for params in (parent.data.params, child.data.params):
        assert (params["grpo.lr"], params["grpo.max_new_tokens"]) == ("0.0002", "28")
        assert params["storage.secret"] == "[redacted]"
        assert len(params["note"]) == 6000
    assert _steps(client, child.info.run_id) == list(range(25))
    assert _steps(client, child.info.run_id, "odd name__") == list(range(25))
    assert _steps(client, state.stage_run_ids["sft"], "policy/loss") == [0]

    traces = client.search_traces(locations=[state.experiment_id], run_id=child.info.run_id)
    assert len(traces) == 6  # three kept steps, two samples each
    scored = [t for t in traces if t.info.tags["status"] == "scored" and t.info.tags["step"] == "10"]
    root = next(span for span in scored[0].data.spans if span.parent_id is None)
    assert root.inputs == {"prompt": "47+85="}
    assert (root.outputs["thinking"], root.outputs["answer"]) == ("7+5=12", "132")
    assert root.attributes["verdict.parts"] == {"accuracy": 1.0, "format": 0.1}
    assert (root.attributes["version_newest"], root.attributes["group_id"]) == (17, "grpo/17")
    failed = next(t for t in traces if t.info.tags["status"] == "timed_out")
    assert str(failed.info.state).endswith("ERROR")
    assert not (Path.cwd() / "mlruns").exists()


def _pump(folder: Path, uri: str) -> None:
    """What the feeding process does, in this one: MLflow is imported here already."""
    from treadle.platform.tracking.mlflow import MlflowSink

    sink = MlflowSink(folder, uri, "tests")
    while sink.pump():
        pass


def test_a_resumed_run_goes_on_in_the_same_mlflow_runs_and_a_replay_adds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    uri = f"sqlite:///{tmp_path / 'store.db'}"
    _track(folder, "off", range(10)).close("interrupted")
    _pump(folder, uri)
    before = load_state(folder)
    _track(folder, "off", range(8, 20), later=1, seed=8).close()
    _pump(folder, uri)
    after = load_state(folder)
    assert (after.parent_run_id, after.stage_run_ids) == (before.parent_run_id, before.stage_run_ids)

    # A feeder killed before it could save its state sends everything again.
    save_state(folder, FeedState(uri=after.uri))
    assert unsent(folder).lines > 20
    _pump(folder, uri)
    again = load_state(folder)
    assert (again.parent_run_id, again.stage_run_ids) == (before.parent_run_id, before.stage_run_ids)
    assert unsent(folder).lines == 0

    client = _client(uri)
    child = client.get_run(again.stage_run_ids["grpo"])
    assert _steps(client, child.info.run_id) == sorted([*range(10), *range(8, 20)])
    assert len(client.search_runs([again.experiment_id])) == 2
    assert len(client.search_traces(locations=[again.experiment_id], run_id=child.info.run_id)) == 4
    parent = client.get_run(again.parent_run_id)
    assert (parent.data.params["later"], parent.data.params["seed"]) == ("1", "7")
    assert parent.data.tags["attempt2.seed"] == "8"
    assert (parent.info.status, parent.data.tags["treadle.attempt"]) == ("FINISHED", "2")


def test_a_run_whose_driver_died_is_marked_as_killed(tmp_path: Path) -> None:
    from treadle.platform.tracking.mlflow import MlflowSink

    folder, uri = tmp_path / "run", f"sqlite:///{tmp_path / 'store.db'}"
    run = RunTracker(folder, TrackingConfig(mlflow="off"), json_mode=True)
    run.stage("sft", total_steps=1).close()
    run.stage("grpo", total_steps=9).log(0, {"reward/mean": 0.5})
    sink = MlflowSink(folder, uri, "tests")
    while sink.pump():
        pass
    sink.abandon()
    state, client = load_state(folder), _client(uri)
    runs = {"": state.parent_run_id, **state.stage_run_ids}
    assert {stage: client.get_run(run_id).info.status for stage, run_id in runs.items()} == {
        "": "KILLED",
        "sft": "FINISHED",
        "grpo": "KILLED",
    }
    run.close()


def test_a_rollouts_file_that_was_tidied_up_does_not_stop_the_feed(tmp_path: Path) -> None:
    folder, uri = tmp_path / "run", f"sqlite:///{tmp_path / 'store.db'}"
    _track(folder, "off", range(12)).close()
    (folder / "rollouts" / "grpo-000000.parquet").unlink()
    _pump(folder, uri)
    state = load_state(folder)
    assert (unsent(folder).lines, state.rejected) == (0, 1)
    client = _client(uri)
    assert _steps(client, state.stage_run_ids["grpo"]) == list(range(12))
    assert len(client.search_traces(locations=[state.experiment_id], run_id=state.stage_run_ids["grpo"])) == 2


def _await_sent(folder: Path, lines: int, deadline_s: float = 120) -> None:
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        if (folder / STATE_FILE).exists() and unsent(folder).lines <= lines:
            return
        time.sleep(0.3)
    raise AssertionError(f"still unsent: {unsent(folder)}")


@pytest.mark.timeout(900)
def test_a_server_that_is_stopped_in_the_middle_gets_every_step(tmp_path: Path) -> None:
    folder, port = tmp_path / "run", free_port()
    config = TrackingConfig(
        mlflow=f"http://127.0.0.1:{port}", experiment="tests", rollouts_every=10, drain_s=150
    )
    with mlflow_server(tmp_path, port):
        run = RunTracker(folder, config, name="demo", settings=SETTINGS, json_mode=True)
        stage = run.stage("grpo", total_steps=60)
        for step in range(20):
            stage.log(step, {"reward/mean": 0.1})
            stage.rollouts(step, [_rollout(0)])
        _await_sent(folder, lines=0)
    slowest = 0.0
    for step in range(20, 40):  # nobody listens now
        began = time.monotonic()
        stage.log(step, {"reward/mean": 0.2})
        stage.rollouts(step, [_rollout(0)])
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.05)
    assert slowest < 0.5
    assert unsent(folder).lines >= 20
    with mlflow_server(tmp_path, port) as uri:
        for step in range(40, 60):
            stage.log(step, {"reward/mean": 0.3})
            stage.rollouts(step, [_rollout(0)])
        stage.close()
        run.close()
        assert run.unsent is not None
        assert (run.unsent.lines, run.unsent.error) == (0, "")
        state = load_state(folder)
        client = _client(uri)
        run_id = state.stage_run_ids["grpo"]
        assert _steps(client, run_id) == list(range(60))
        traces = client.search_traces(locations=[state.experiment_id], run_id=run_id)
        assert sorted(int(trace.info.tags["step"]) for trace in traces) == [0, 10, 20, 30, 40, 50]


def test_a_server_that_hangs_costs_the_run_its_drain_time_and_no_more(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        run = _track(tmp_path / "run", uri, range(30))
        began = time.monotonic()
        run.close(timeout_s=3)
        assert time.monotonic() - began < 12
    assert run.mlflow is not None
    assert not Path(f"/proc/{run.mlflow.feed.pid}").exists()
    assert run.unsent is not None
    assert run.unsent.lines >= 30

    # What the server never took is sent later, by hand.
    other = f"sqlite:///{tmp_path / 'store.db'}"
    result = sync(tmp_path / "run", other, "tests", timeout_s=120)
    assert (result.lines, result.error) == (0, "")
    state = load_state(tmp_path / "run")
    assert _steps(_client(other), state.stage_run_ids["grpo"]) == list(range(30))


_DRIVER = """
import sys, time
from pathlib import Path
from treadle.platform.tracking import RunTracker, TrackingConfig
run = RunTracker(Path(sys.argv[1]), TrackingConfig(mlflow=sys.argv[2]), json_mode=True)
run.stage("grpo", total_steps=5).log(0, {"reward/mean": 0.5})
print(run.mlflow.feed.pid, flush=True)
time.sleep(600)
"""


def _kill_driver(folder: Path, uri: str) -> int:
    """Kills a driver as soon as its feeder works, which it does at the lowest priority. Returns its id."""
    driver = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(folder), uri], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    feeder = int(driver.stdout.readline())
    deadline = time.monotonic() + 60
    while os.getpriority(os.PRIO_PROCESS, feeder) != 19:
        assert time.monotonic() < deadline, "the feeder does not give way"
        time.sleep(0.1)
    driver.kill()
    driver.wait(10)
    return feeder


def _await_end(pid: int, deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.2)
    raise AssertionError(f"the feeder {pid} outlives its driver")


def test_a_killed_driver_leaves_no_feeder_behind(tmp_path: Path) -> None:
    feeder = _kill_driver(tmp_path / "run", "http://127.0.0.1:9")
    _await_end(feeder, 30)
    assert unsent(tmp_path / "run").lines >= 2


def test_state_that_is_damaged_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text(json.dumps({"unknown": 1}))
    with pytest.raises(StorageError, match=r"mlflow\.json is damaged.*Delete it"):
        load_state(tmp_path)


def test_a_folder_without_a_spool_cannot_be_synced(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"holds no metrics\.jsonl"):
        sync(tmp_path, "sqlite:///x.db", "tests", timeout_s=1)
