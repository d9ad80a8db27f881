"""The two loads on which GRPO steps are compared, and what both sides read of them.

Both sides get the same model folder, the same prompts in the same order, the same objective (DAPO's loss, clip 0.2
and 0.28, group-standardised rewards, no KL), optimiser, sampling and reward code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.bench_rows import run_child
from tests.benchmarks.markov_model import Shape, write_markov_model

from treadle.platform.config import to_yaml
from treadle.platform.records import Prompt
from treadle.workflows.configs import GrpoConfig
from treadle.workflows.data.tokenization import load_tokenizer
from treadle.workflows.inputs import build_inputs
from treadle.workflows.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one step has to do. `settings` are the recipe's, beyond the demo's."""

    name: str
    title: str
    prompts: int
    group: int
    max_new_tokens: int
    settings: tuple[str, ...]
    warm_steps: int
    """Left out of every process's measurement."""
    steps: int
    """Measured per process."""
    rounds: int
    """Processes per side."""
    step_deadline_s: float


DEMO = Load(
    name="demo",
    title="2 layers d128 (0.4M), 192 completions of at most 28 tokens",
    prompts=24,
    group=8,
    max_new_tokens=28,
    settings=(),
    warm_steps=3,
    steps=30,
    rounds=3,
    step_deadline_s=30.0,
)
TAIL = Load(
    name="tail",
    title="8 layers d384 (15M), 64 completions of long-tailed length up to 256 tokens",
    prompts=8,
    group=8,
    max_new_tokens=256,
    settings=(
        "rollout.slots=32",
        "rollout.row_block=4",
        "rollout.kv_step_tokens=64",
        "rollout.max_context_tokens=320",
        "stages.grpo.optim.lr=1e-6",
        "stages.grpo.prompts.kind=file",
    ),
    warm_steps=1,
    steps=3,
    rounds=2,
    step_deadline_s=240.0,
)
LOADS = {load.name: load for load in (DEMO, TAIL)}

TAIL_SHAPE = Shape(layers=8, hidden=384, heads=6, kv_heads=2, intermediate=1280, context_tokens=320)
TAIL_THOUGHT_TOKENS = 64.0
"""Mean of the geometric part of a completion; six tokens of template come on top."""
_OTHERS = ("base", "sft", "student", "export")
_COLD_START = ("~stages.grpo", "~stages.student", "~stages.export", "tracking.mlflow=off")


def step_recipe(load: Load, folder: Path, steps: int, overrides: Sequence[str] = ()) -> Recipe:
    """The demo's recipe with its GRPO stage only, from the load's model in `folder`; what TRL does not do either
    (checkpoints, MLflow, tables of rollouts, evaluation between steps) is off."""
    prompts = folder / "prompts.jsonl"
    return load_recipe(
        "demo",
        [
            *(f"~stages.{stage}" for stage in _OTHERS),
            "~stages.grpo.model",
            f"stages.grpo.model.path={folder / 'model'}",
            f"stages.grpo.steps={steps}",
            f"stages.grpo.prompts_per_step={load.prompts}",
            f"stages.grpo.group_size={load.group}",
            f"stages.grpo.max_new_tokens={load.max_new_tokens}",
            f"stages.grpo.evaluate.max_new_tokens={load.max_new_tokens}",
            "stages.grpo.optim.schedule=constant",
            *load.settings,
            *([f"stages.grpo.prompts.url={prompts}"] if prompts.exists() else []),
            "checkpoint.every_steps=0",
            "tracking.mlflow=off",
            "tracking.rollouts_every=0",
            *overrides,
        ],
    )


def grpo_stage(recipe: Recipe) -> GrpoConfig:
    """The recipe's one stage."""
    stage = recipe.stages["grpo"]
    assert isinstance(stage, GrpoConfig)
    return stage


def ordered_prompts(recipe: Recipe, folder: Path, steps: int) -> list[Prompt]:
    """The prompts of all steps in the order in which a run of the recipe takes them."""
    train = build_inputs(recipe, load_tokenizer(str(folder / "model")))["grpo"].train
    assert train is not None
    return [train.at(index) for index in range(steps * grpo_stage(recipe).prompts_per_step)]


def prepare(load: Load, folder: Path) -> None:
    """Makes the load's model (and prompts) in `folder`, unless they are there, made from the same recipe."""
    made_from = folder / "made_from.yaml"
    source = to_yaml(load_recipe("demo", _COLD_START))
    if made_from.exists() and made_from.read_text() == source:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if load is DEMO:
        _prepare_demo(folder)
    else:
        _prepare_tail(folder)
    made_from.write_text(source)


def _prepare_demo(folder: Path) -> None:
    """The demo's own policy at the start of GRPO: pretrained and fine-tuned by the demo's recipe."""
    run = folder / "run"
    run_child(
        "treadle.workflows.cli",
        ["run", "demo", *_COLD_START, "--json", "--dir", str(run)],
        log=folder / "prepare.log",
        deadline_s=1200.0,
    )
    shutil.copytree(run / "artifacts" / "sft", folder / "model")


def _prepare_tail(folder: Path) -> None:
    """A random 15M model with the lengths of `markov_model`; the question is whether a sum is odd."""
    tokenizer = _demo_tokenizer(folder / "tokenizer")
    rows = [
        {"id": f"odd-{a}+{b}", "prompt": f"{a}+{b}=", "answer": str((a + b) % 2)}
        for a in range(10, 100)
        for b in range(10, 100)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_markov_model(folder / "model", tokenizer, TAIL_SHAPE, TAIL_THOUGHT_TOKENS)


def _demo_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(load_recipe("demo").tokenizer.write(folder)))
