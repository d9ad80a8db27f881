"""The tracker as a loop sees it: it writes, shows, and never raises."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treadle.platform.contracts import Tracker
from treadle.platform.errors import ConfigError
from treadle.platform.records import Drawn, Prompt, StopReason, Verdict, VerdictStatus, WeightVersion
from treadle.platform.tracking import (
    RunTracker,
    TrackingConfig,
    read_events,
    read_metrics,
    read_rollouts,
    rollout_rows,
    split_completion,
    tracker,
)

OFF = TrackingConfig(mlflow="off")


def _run(folder: Path, config: TrackingConfig = OFF) -> tuple[RunTracker, io.StringIO]:
    stream = io.StringIO()
    return RunTracker(folder, config, name="demo", settings={"seed": 7}, stream=stream), stream


def _drawn(version: int = 3) -> Drawn:
    prompt = Prompt(
        id="addition-47+85",
        text="47+85=",
        token_ids=np.arange(6, dtype=np.int32),
        verifier="exact",
        payload={"answer": "132"},
    )
    weights = WeightVersion(step=version)
    return Drawn(
        id="grpo/17", prompt=prompt, group=None, texts=None, lengths=(5, 6), worker="rollout-0", wall_s=0.2,
        stops=(StopReason.EOS, StopReason.LENGTH), oldest=weights, newest=weights,
    )  # fmt: skip


def _verdicts() -> tuple[Verdict, Verdict]:
    parts = (("accuracy", 1.0), ("format", 0.1))
    return (
        Verdict(status=VerdictStatus.SCORED, reward=1.1, parts=parts, wall_s=0.01, detail="", verifier="exact/1"),
        Verdict(
            status=VerdictStatus.TIMED_OUT, reward=math.nan, parts=(), wall_s=2.0, detail="2 s", verifier="exact/1"
        ),
    )  # fmt: skip


def test_a_stage_tracker_keeps_the_contract(tmp_path: Path) -> None:
    run, _ = _run(tmp_path)
    stage = run.stage("grpo", total_steps=2)
    assert isinstance(stage, Tracker)
    assert isinstance(run, Tracker)
    stage.log(0, {"reward/mean": 0.25})
    stage.event("skipped", {"reason": "nan"})
    stage.close()
    run.close()
    (row,) = read_metrics(tmp_path)
    assert (row.stage, row.step, row.attempt, row.metrics["reward/mean"]) == ("grpo", 0, 1, 0.25)
    kinds = [(event.kind, event.stage) for event in read_events(tmp_path)]
    assert kinds == [
        ("run_start", ""),
        ("stage_start", "grpo"),
        ("skipped", "grpo"),
        ("stage_end", "grpo"),
        ("run_end", ""),
    ]


def test_a_resumed_run_counts_its_attempts_and_its_steps_replace_the_old_ones(tmp_path: Path) -> None:
    first, _ = _run(tmp_path)
    stage = first.stage("grpo", total_steps=9)
    for step in range(5):
        stage.log(step, {"reward/mean": 0.1})
    # The first attempt is killed here: nothing is closed.
    second, stream = _run(tmp_path)
    stage = second.stage("grpo", total_steps=9)
    stage.log(3, {"reward/mean": 0.9})
    second.close()
    rows = read_metrics(tmp_path)
    assert [(row.step, row.attempt, row.metrics["reward/mean"]) for row in rows] == [
        (0, 1, 0.1),
        (1, 1, 0.1),
        (2, 1, 0.1),
        (3, 2, 0.9),
    ]
    assert "(attempt 2)" in stream.getvalue()
    first.close()


def test_the_console_names_the_folder_the_report_and_the_end(tmp_path: Path) -> None:
    run, stream = _run(tmp_path)
    stage = run.stage("grpo", total_steps=1)
    stage.log(0, {"reward/mean": 0.5})
    stage.event("failure", {"role": "verify", "message": "worker 3 died"})
    stage.close()
    run.close("failed")
    lines = stream.getvalue().splitlines()
    assert lines[0] == f"run demo  folder {tmp_path}  report {tmp_path / 'report.html'}"
    assert lines[1].startswith("grpo 1/1  reward 0.5")
    assert lines[2] == "failure in grpo: role=verify, message=worker 3 died"
    assert lines[3].startswith("run failed after ")


def test_json_mode_leaves_standard_output_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunTracker(tmp_path, OFF, json_mode=True)
    stage = run.stage("sft", total_steps=1)
    stage.log(0, {"policy/loss": 1.0})
    stage.close()
    run.close()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "sft 1/1" in shown.err


def test_aliases_are_logged_beside_the_canonical_names(tmp_path: Path) -> None:
    run, _ = _run(tmp_path, TrackingConfig(mlflow="off", aliases=["verl", "trl"]))
    run.stage("grpo", total_steps=1).log(
        0, {"reward/mean": 0.5, "reward/part/format": 0.2, "timing_s/learn": 1.0}
    )
    run.close()
    (row,) = read_metrics(tmp_path)
    assert row.metrics == {
        "reward/mean": 0.5,
        "critic/score/mean": 0.5,
        "critic/rewards/mean": 0.5,
        "reward": 0.5,
        "reward/part/format": 0.2,
        "rewards/format/mean": 0.2,
        "timing_s/learn": 1.0,
        "timing_s/update_actor": 1.0,
    }


def test_rollouts_are_kept_every_kth_step_and_read_back_whole(tmp_path: Path) -> None:
    run, _ = _run(tmp_path, TrackingConfig(mlflow="off", rollouts_every=5, rollouts_per_step=2))
    stage = run.stage("grpo", total_steps=20)
    texts = ("<think>7+5=12</think><answer>132</answer>", "<think>7+5=")
    rows = rollout_rows(_drawn(), texts, _verdicts())
    for step in range(8):
        stage.rollouts(step, [*rows, *rows])
    run.close()
    files = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert files == ["grpo-000000.parquet", "grpo-000005.parquet"]
    kept = read_rollouts(tmp_path / "rollouts" / "grpo-000005.parquet")
    assert [(k.stage, k.step, k.attempt) for k in kept] == [("grpo", 5, 1)] * 2
    assert kept[0].row == rows[0]
    assert kept[0].row.parts == {"accuracy": 1.0, "format": 0.1}
    assert (kept[1].row.status, math.isnan(kept[1].row.reward), kept[1].row.stop) == (
        "timed_out",
        True,
        "length",
    )
    announced = [event.fields["file"] for event in read_events(tmp_path) if event.kind == "rollouts"]
    assert announced == ["rollouts/grpo-000000.parquet", "rollouts/grpo-000005.parquet"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>4+5=9</think><answer>9</answer>", ("4+5=9", "9")),
        ("4+5=9</think><answer>9</answer>", ("4+5=9", "9")),
        ("<think>4+5", ("4+5", "")),
        ("<think>a</think> so 9", ("a", "so 9")),
        ("<answer>1</answer><answer>2</answer>", ("", "2")),
        ("<think>a<answer>1</answer></think><answer>2", ("a<answer>1</answer>", "2")),
        ("just 9", ("", "just 9")),
        ("", ("", "")),
    ],
)
def test_a_completion_splits_into_thinking_and_answer(text: str, parts: tuple[str, str]) -> None:
    assert split_completion(text) == parts


def test_a_rollouts_folder_that_cannot_be_written_warns_once_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "rollouts").write_text("a file is in the way")
    run, stream = _run(tmp_path, TrackingConfig(mlflow="off", rollouts_every=1))
    stage = run.stage("grpo", total_steps=3)
    for step in range(3):
        stage.rollouts(step, rollout_rows(_drawn(), ("a", "b"), _verdicts()))
        stage.log(step, {"reward/mean": 1.0})
    run.close()
    assert stream.getvalue().count("are lost") == 1
    assert len(read_metrics(tmp_path)) == 3


def test_settling_waits_for_the_rollouts_and_says_which_are_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    write = tracker.write_rollouts
    monkeypatch.setattr(tracker, "WRITE_DEADLINE_S", 0.05)

    def slow_disk(*args: Any, **kwargs: Any) -> str:
        assert release.wait(30)
        return write(*args, **kwargs)

    monkeypatch.setattr(tracker, "write_rollouts", slow_disk)
    run, stream = _run(tmp_path, TrackingConfig(mlflow="off", rollouts_every=1))
    stage = run.stage("grpo", total_steps=1)
    stage.rollouts(0, rollout_rows(_drawn(), ("1", "2"), _verdicts()))
    stage.settle()
    assert "sampled rollouts of 1 steps are not on the disk after 0.05 s" in stream.getvalue()
    monkeypatch.setattr(tracker, "WRITE_DEADLINE_S", 30.0)
    release.set()
    stage.settle()
    (file,) = tmp_path.glob("rollouts/**/*.parquet")
    assert len(read_rollouts(file)) == 2
    run.close()


def test_numpy_figures_are_figures(tmp_path: Path) -> None:
    run, _ = _run(tmp_path)
    run.stage("grpo", total_steps=1).log(0, {"a": np.float32(0.5), "b": np.int64(3)})  # type: ignore[dict-item]
    run.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["metrics"] == {"a": 0.5, "b": 3.0}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (TrackingConfig(mlflow="localhost"), "tracking.mlflow"),
        (TrackingConfig(aliases=["wandb"]), "tracking.aliases"),
        (TrackingConfig(rollouts_every=-1), "tracking.rollouts_every"),
        (TrackingConfig(experiment=""), "tracking.experiment"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(config: TrackingConfig, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        config.check()


def test_the_driver_never_imports_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from treadle.platform.tracking import *; "
        f"run = RunTracker(Path({str(tmp_path)!r}), TrackingConfig(mlflow='http://127.0.0.1:9')); "
        "stage = run.stage('grpo', total_steps=1); stage.log(0, {'reward/mean': 1.0}); stage.close(); "
        "run.close(timeout_s=0); assert not any(name.split('.')[0] == 'mlflow' for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
