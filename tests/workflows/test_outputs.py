"""When a finished stage is still valid: its key follows what goes in, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from treadle.platform.ledger import Ledger
from treadle.platform.tracking import RunTracker
from treadle.workflows.crew import Crew
from treadle.workflows.evaluate import EvalReport
from treadle.workflows.folder import RunFolder
from treadle.workflows.outputs import StageOutput, finished, outputs_of, record
from treadle.workflows.recipe import load_recipe
from treadle.workflows.run import Run

REPORT = EvalReport(
    sampled=0.5,
    greedy=None,
    n=4,
    samples=2,
    ci95=0.1,
    pass_at_k=((1, 0.5), (2, 0.75)),
    unscored=1,
    mean_length=3.5,
)
OUTPUT = StageOutput(
    stage="sft",
    kind="sft",
    key="k",
    model="/runs/x/artifacts/sft",
    digest="d",
    steps=7,
    wall_s=1.5,
    evaluation=REPORT,
    notes={"kept": 3.0},
)


def key_of(stage: str, *overrides: str, digests: str = "d") -> str:
    """The key of a demo stage, its predecessors finished with weights of these digests. Keys need no roles."""
    run = Run(
        load_recipe("demo", list(overrides)),
        RunFolder(Path("unused")),
        cast(Crew, None),
        cast(Ledger, None),
        cast(RunTracker, None),
        None,  # type: ignore[arg-type]  no tokenizer is opened either
        {},
        0.0,
    )
    for name in ("base", "sft", "grpo", "student"):
        run.outputs[name] = replace(OUTPUT, stage=name, digest=f"{digests}-{name}")
    return run.key(stage)


@pytest.mark.parametrize(
    "change",
    [
        "stages.grpo.steps=201",
        "stages.grpo.optim.lr=1.0e-4",
        "stages.grpo.objective.kind=grpo",
        "stages.grpo.prompts.generator.digits=3",
        "stages.grpo.group_size=4",
        "stages.grpo.staleness=1",
        "stages.grpo.evaluate.prompts=100",
        "seed=2",
        "tokenizer.alphabet='0123456789+=,;: '",
        "verify.parts.format=0.2",
    ],
)
def test_a_setting_that_changes_the_result_changes_the_key(change: str) -> None:
    assert key_of("grpo", change) != key_of("grpo")


@pytest.mark.parametrize(
    "change",
    [
        "name=other",
        "rollout.workers=5",
        "rollout.draw_deadline_s=30",
        "verify.processes=7",
        "verify.deadline_s=1.5",
        "learner.step_deadline_s=30",
        "tracking.mlflow=off",
        "checkpoint.every_steps=3",
        "cluster.placement_deadline_s=5",
        "broadcast.probe_sequences=3",
        "stages.sft.steps=5",
        "stages.grpo.take_deadline_s=30",
    ],
)
def test_a_setting_that_only_says_where_and_how_long_does_not(change: str) -> None:
    assert key_of("grpo", change) == key_of("grpo")


def test_other_weights_upstream_make_another_stage() -> None:
    assert key_of("grpo", digests="e") != key_of("grpo")
    assert key_of("base", digests="e") == key_of("base")  # it builds on none
    assert key_of("student", digests="e") != key_of("student")  # through its teacher


def test_a_stage_is_finished_only_with_the_same_key(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "artifacts").mkdir()
    assert finished(folder, "sft", "k") is None
    record(folder, OUTPUT)
    assert finished(folder, "sft", "k") == OUTPUT
    assert finished(folder, "sft", "another") is None
    assert outputs_of(folder) == {"sft": OUTPUT}


def test_an_output_without_an_evaluation_survives_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "artifacts").mkdir()
    plain = replace(OUTPUT, evaluation=None, notes={})
    record(folder, plain)
    assert finished(folder, "sft", "k") == plain


def test_a_folder_that_was_moved_finds_its_models(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "here")
    folder.artifact("sft").mkdir(parents=True)
    record(folder, replace(OUTPUT, model=str(folder.artifact("sft"))))
    folder.path.rename(tmp_path / "there")
    (output,) = outputs_of(RunFolder(tmp_path / "there")).values()
    assert output.model == str(tmp_path / "there" / "artifacts" / "sft")
