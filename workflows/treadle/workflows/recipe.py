"""A recipe: every setting of a run in one frozen tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treadle.actors.broadcast.config import BroadcastConfig
from treadle.actors.learner.config import GroupConfig
from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.verify.config import VerifyConfig
from treadle.cluster.recovery import RecoveryConfig
from treadle.cluster.session import ClusterConfig
from treadle.platform.config import load, variant, variant_map, variants
from treadle.platform.errors import ConfigError
from treadle.platform.tracking.config import TrackingConfig
from treadle.workflows.configs import (
    DistillConfig,
    ExportConfig,
    GrpoConfig,
    PretrainConfig,
    SftConfig,
    StageConfig,
    TrainedConfig,
)
from treadle.workflows.evaluate import EvaluateConfig
from treadle.workflows.models import ModelConfig
from treadle.workflows.saving import CheckpointConfig
from treadle.workflows.tokenizers import TokenizerConfig

RECIPES = Path(__file__).parent / "recipes"

variants(
    "stage",
    {
        "pretrain": PretrainConfig,
        "sft": SftConfig,
        "grpo": GrpoConfig,
        "distill": DistillConfig,
        "export": ExportConfig,
    },
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Roles and stages of a run. `stages` run in order; each may start from an earlier one's weights."""

    name: str = "run"
    """Names the run folder (runs/<name>) and the tracking experiment."""
    seed: int = 0
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tokenizer: TokenizerConfig = variant("tokenizer", kind="characters")
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    learner: GroupConfig = field(default_factory=GroupConfig)
    broadcast: BroadcastConfig = field(default_factory=BroadcastConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    stages: dict[str, StageConfig] = variant_map("stage")

    def check(self) -> None:
        """Refuses combinations that cannot work, naming the setting to change."""
        if not self.stages:
            raise ConfigError(
                "stages: the recipe has none.", "Add at least one stage, e.g. stages.grpo.kind=grpo."
            )
        earlier: dict[str, StageConfig] = {}
        for name, stage in self.stages.items():
            where = f"stages.{name}"
            _check_name(name)
            _check_model(where, stage, earlier)
            _check_stage(where, stage, self)
            earlier[name] = stage


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from a file, an fsspec URL or by the name of a shipped one. Raises `ConfigError`."""
    return load(Recipe, source, overrides, library=RECIPES)


def _check_name(name: str) -> None:
    if not name.replace("_", "").replace("-", "").isalnum() or name == "tokenizer":
        raise ConfigError(
            f"stages.{name}: the name becomes a folder.", "Use letters, digits, - and _; not 'tokenizer'."
        )


def _check_model(where: str, stage: StageConfig, earlier: dict[str, StageConfig]) -> None:
    stage.model.check(f"{where}.model", earlier)
    if isinstance(stage, DistillConfig) and stage.teacher not in earlier:
        raise ConfigError(
            f"{where}.teacher={stage.teacher or '(empty)'} is not an earlier stage.",
            f"Name one of: {', '.join(earlier) or 'none yet'}.",
        )
    if isinstance(stage, ExportConfig) and not stage.model.stage:
        raise ConfigError(f"{where}.model.stage is empty.", "Name the stage to export.")


def _check_stage(where: str, stage: StageConfig, recipe: Recipe) -> None:
    if not isinstance(stage, ExportConfig):
        _check_schedule(where, stage)
    if isinstance(stage, GrpoConfig):
        _check_grpo(where, stage, recipe)
    if (
        isinstance(stage, PretrainConfig)
        and stage.model.architecture
        and stage.block_tokens > stage.model.context_tokens
    ):
        raise ConfigError(
            f"{where}.block_tokens={stage.block_tokens} exceeds "
            f"{where}.model.context_tokens={stage.model.context_tokens}.",
            "Lower the first or raise the second.",
        )
    for part in ("evaluate", "check_with"):
        config = getattr(stage, part, None)
        if isinstance(config, EvaluateConfig):
            config.check(f"{where}.{part}")
    _check_engine(where, stage.model, recipe)


def _check_schedule(where: str, stage: TrainedConfig) -> None:
    steps = stage.optim.total_steps or stage.steps
    if stage.optim.schedule != "constant" and steps <= stage.optim.warmup_steps:
        raise ConfigError(
            f"{where}.optim.warmup_steps={stage.optim.warmup_steps} leaves nothing of {steps} steps for the "
            f"{stage.optim.schedule} decay.",
            f"Lower it, raise {where}.steps, or set {where}.optim.schedule=constant.",
        )


def _check_grpo(where: str, stage: GrpoConfig, recipe: Recipe) -> None:
    stage.reward.check(f"{where}.reward", recipe.verify.parts)
    if stage.reward.per_part and not stage.objective.takes_parts:
        raise ConfigError(
            f"{where}.reward.per_part=true, but {where}.objective does not standardise rewards within groups.",
            f"Set {where}.objective.kind to grpo, dapo, gspo or cispo.",
        )
    if stage.objective.needs_groups and stage.group_size < 2:
        raise ConfigError(
            f"{where}.group_size={stage.group_size} with the group baseline of {where}.objective: every advantage "
            "would be zero.",
            f"Set {where}.group_size to 2 or more (the paper uses 64, R1 16).",
        )
    if stage.temperature <= 0:
        raise ConfigError(
            f"{where}.temperature={stage.temperature} draws the same sample every time.", "Use 1.0."
        )
    if stage.staleness < 0:
        raise ConfigError(
            f"{where}.staleness={stage.staleness} is negative.", "Use 0 for on-policy training."
        )
    if stage.staleness > 0 and stage.top_p < 1:
        raise ConfigError(
            f"{where}.top_p={stage.top_p} with {where}.staleness={stage.staleness}: the engine's log-probabilities are "
            "renormalised over a truncated support, so off-policy corrections would be wrong.",
            f"Set {where}.top_p=1 or {where}.staleness=0.",
        )
    if stage.max_new_tokens >= recipe.rollout.max_context_tokens:
        raise ConfigError(
            f"{where}.max_new_tokens={stage.max_new_tokens} leaves no room for a prompt in "
            f"rollout.max_context_tokens={recipe.rollout.max_context_tokens}.",
            "Lower the first or raise the second.",
        )


def _check_engine(where: str, model: ModelConfig, recipe: Recipe) -> None:
    if (
        recipe.rollout.engine == "vllm"
        and recipe.rollout.device == "cpu"
        and model.architecture
        and model.tie_embeddings
    ):
        raise ConfigError(
            f"{where}.model.tie_embeddings=true with rollout.engine=vllm on the CPU: its weight reload silently "
            "leaves the tied output layer at the old version.",
            f"Set {where}.model.tie_embeddings=false, or rollout.engine=torch.",
        )


def recipe_names() -> dict[str, str]:
    """Shipped recipes and the first comment line of each."""
    names: dict[str, Any] = {}
    for file in sorted(RECIPES.glob("*.yaml")):
        first = file.read_text().splitlines()[0] if file.read_text() else ""
        names[file.stem] = first.lstrip("# ").strip()
    return names
