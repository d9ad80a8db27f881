"""Looking at a run from its folder alone: where it stands, and its models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.actors.rollout.tiny_models import write_model

from treadle.platform.errors import ClusterError, ConfigError, DataError
from treadle.platform.ledger import Ledger
from treadle.platform.tracking import RunTracker, TrackingConfig
from treadle.workflows import detached, inspection
from treadle.workflows.export import export_model, folder_digest
from treadle.workflows.folder import RunFolder
from treadle.workflows.outputs import StageOutput, record
from treadle.workflows.recipe import load_recipe


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of three groups and one step, as its own process left it."""
    folder = RunFolder.of(tmp_path / "run", load_recipe("demo"))
    with Ledger.open(folder.ledger) as ledger:
        for number in range(3):
            ledger.issue(f"grpo/{number:08d}", f"p{number}", 0)
        ledger.drop(["grpo/00000002"], "unscored")
    tracker = RunTracker(folder.path, TrackingConfig(mlflow="off"), name="t", json_mode=True)
    tracker.stage("grpo", total_steps=10).log(4, {"reward/mean": 0.25, "policy/loss": 0.5})
    tracker.close()
    return folder


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(timeout=60)
    return process.pid


def test_a_run_says_its_stage_step_figures_and_groups(run: RunFolder) -> None:
    run.set_state(state="running", pid=os.getpid(), attempts=2)
    found = inspection.status(run.path)
    assert (found["state"], found["attempts"], found["stage"], found["step"]) == ("running", 2, "grpo", 4)
    assert found["figures"] == {"reward/mean": 0.25, "policy/loss": 0.5}
    assert found["samples"]["issued"] == 3
    assert found["samples"]["dropped"] == {"unscored": 1}
    assert "last step: grpo 5" in found["text"]
    assert "treadle resume" not in found["text"]


@pytest.mark.parametrize("ended", ["interrupted", "failed"])
def test_a_run_that_did_not_finish_says_how_to_continue(run: RunFolder, ended: str) -> None:
    run.set_state(state=ended, pid=dead_process(), attempts=1)
    found = inspection.status(run.path)
    assert found["state"] == ended
    assert f"continue with: treadle resume {run.path}" in found["text"]


def test_a_run_whose_process_is_gone_without_a_word_was_killed(run: RunFolder) -> None:
    run.set_state(state="running", pid=dead_process(), attempts=1)
    found = inspection.status(run.path)
    assert found["state"] == "killed"
    assert "treadle resume" in found["text"]


CONTROLLER = {
    "name": "run-0123456789ab",
    "address": "10.0.0.1:6379",
    "pid": 7,
    "host": "node-3",
    "since_unix_s": 0.0,
}


def test_a_detached_run_says_where_its_controller_is_and_since_when(run: RunFolder) -> None:
    run.set_state(state="running", pid=os.getpid(), attempts=1, controller=CONTROLLER)
    text = inspection.status(run.path)["text"]
    assert (
        "detached: controller run-0123456789ab, process 7 on node-3, runs it on the cluster at 10.0.0.1:6379"
        in text
    )
    assert " since 19" in text
    run.set_state(pid=dead_process())
    assert "gone without a word, and what belonged to it ended" in inspection.status(run.path)["text"]
    run.set_state(state="finished")
    assert "node-3, ran it on" in inspection.status(run.path)["text"]
    run.set_state(controller=None)
    assert "detached: " not in inspection.status(run.path)["text"]


def test_a_silent_controller_elsewhere_is_asked_for_where_its_cluster_still_answers(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def lost(folder: RunFolder) -> str:
        asked.append(str(folder.path))
        return "its node died"

    monkeypatch.setattr(detached, "lost", lost)
    run.set_state(state="running", pid=1, host="elsewhere", attempts=1, controller=CONTROLLER)
    run.set_state(started_unix_s=time.time())
    assert inspection.status(run.path)["state"] == "running"
    assert asked == [], "it has only just begun"
    run.set_state(started_unix_s=time.time() - 10)
    found = inspection.status(run.path)
    assert found["state"] == "killed"
    assert "node-3, ran it on the cluster at 10.0.0.1:6379 since" in found["text"]
    assert "; its node died, and what belonged to it ended with it" in found["text"]
    assert f"continue with: treadle resume {run.path} --detach" in found["text"]
    monkeypatch.setattr(detached, "lost", lambda folder: "")
    assert inspection.status(run.path)["state"] == "running", "its head knows nothing bad of it"


def test_a_cluster_that_does_not_answer_either_is_named_with_what_to_do(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(folder: RunFolder) -> str:
        raise ClusterError("No Ray cluster answers at cluster.address=10.0.0.1:6379 (refused).")

    monkeypatch.setattr(detached, "lost", gone)
    run.set_state(state="running", pid=1, host="elsewhere", attempts=1, controller=CONTROLLER)
    run.set_state(started_unix_s=time.time() - 10)
    found = inspection.status(run.path)
    assert found["state"] == "running", "it may be, and only this command lacks a token"
    assert "continue with" not in found["text"]
    run.set_state(started_unix_s=0.0)
    (run.path / "roles.json").write_text('{"unix_s": 0, "driver": {}, "roles": {}}')
    os.utime(run.path / "roles.json", (1000, 1000))
    found = inspection.status(run.path)
    assert found["state"] == "silent"
    assert (
        "; whether it lives cannot be found out: No Ray cluster answers at cluster.address=10.0.0.1:6379 (refused)"
        in found["text"]
    )
    assert f"continue with: treadle resume {run.path} --take-over" in found["text"]


def test_what_was_lowered_for_want_of_memory_is_shown(run: RunFolder) -> None:
    run.set_state(state="running", pid=os.getpid(), attempts=1)
    seen = {
        "unix_s": 0,
        "driver": {"stage": "rl", "step": 1, "doing": "learn", "for_s": 1.0},
        "sizes": {"rollout.workers": 2},
        "roles": {},
        "lowered": {"rollout-1": "rollout.slots=8, the recipe says 16"},
    }
    (run.path / "roles.json").write_text(json.dumps(seen))
    said = inspection.status(run.path)["text"]
    assert "memory ran out: rollout-1 has rollout.slots=8, the recipe says 16" in said


def test_a_run_of_another_machine_is_silent_when_its_roles_say_nothing_any_more(run: RunFolder) -> None:
    run.set_state(state="running", pid=1, host="elsewhere", attempts=1, started_unix_s=0.0)
    assert inspection.status(run.path)["state"] == "running", "it may still be starting"
    (run.path / "roles.json").write_text('{"unix_s": 0, "driver": {}, "roles": {}}')
    os.utime(run.path / "roles.json", (1000, 1000))
    found = inspection.status(run.path)
    assert found["state"] == "silent"
    assert "treadle resume" in found["text"]


def test_a_run_that_never_started_has_no_figures(tmp_path: Path) -> None:
    folder = RunFolder.of(tmp_path / "run", load_recipe("demo"))
    found = inspection.status(folder.path)
    assert (found["state"], found["stage"], found["samples"]) == ("never started", None, {})


def finished_stage(run: RunFolder, name: str, seed: int = 0) -> str:
    digest = folder_digest(Path(write_model(run.artifact(name), layers=1, seed=seed, tied=False)))
    output = StageOutput(
        stage=name,
        kind="sft",
        key="k",
        model=str(run.artifact(name)),
        digest=digest,
        steps=1,
        wall_s=0.0,
        evaluation=None,
        notes={},
    )
    record(run, output)
    return digest


def test_the_last_finished_stage_is_exported_unless_another_is_named(run: RunFolder, tmp_path: Path) -> None:
    first, last = finished_stage(run, "sft"), finished_stage(run, "grpo", seed=1)
    os.utime(run.output("sft"), (1, 1))
    assert inspection.export(run.path, "", None)["digest"] == last
    assert inspection.export(run.path, "sft", tmp_path / "mine")["digest"] == first
    assert folder_digest(run.path / "export" / "grpo") == last
    assert folder_digest(tmp_path / "mine") == first
    assert (tmp_path / "mine" / "tokenizer.json").exists()


def test_a_stage_that_is_not_finished_is_refused_with_those_that_are(run: RunFolder) -> None:
    with pytest.raises(DataError, match="no finished stage with a model"):
        inspection.export(run.path, "", None)
    finished_stage(run, "sft")
    with pytest.raises(ConfigError, match="no finished stage grpo"):
        inspection.export(run.path, "grpo", None)


def test_weights_that_changed_after_the_run_are_not_exported(run: RunFolder, tmp_path: Path) -> None:
    digest = finished_stage(run, "sft")
    weights = run.artifact("sft") / "model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name] = torch.nextafter(tensors[name], torch.tensor(torch.inf))  # one unit in the last place
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match="changed or damaged"):
        export_model(run.artifact("sft"), tmp_path / "mine", digest)
    assert list(tmp_path.glob("mine*")) == []


def test_an_export_replaces_an_older_one_whole(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "stale.safetensors").write_bytes(b"x")
    digest = finished_stage(run, "sft")
    export_model(run.artifact("sft"), tmp_path / "mine", digest)
    assert not (tmp_path / "mine" / "stale.safetensors").exists()
    assert folder_digest(tmp_path / "mine") == digest
