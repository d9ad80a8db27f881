"""The stages' settings: one frozen dataclass per kind of stage, and what they share."""

from __future__ import annotations

from dataclasses import dataclass, field

from treadle.actors.learner.config import OptimConfig
from treadle.platform.config import variant, variants
from treadle.platform.errors import ConfigError
from treadle.platform.objectives.base import Objective
from treadle.platform.objectives.registry import OBJECTIVES
from treadle.workflows.data.registry import CorpusConfig, PairsConfig, PromptsConfig
from treadle.workflows.evaluate import EvaluateConfig
from treadle.workflows.models import ModelConfig
from treadle.workflows.rewards import RewardConfig

variants("objective", {k: v for k, v in OBJECTIVES.items() if k != "cross_entropy"})


def positive(**settings: float) -> None:
    """Raises `ConfigError` for the first setting below 1; the loader adds the stage's name."""
    for name, value in settings.items():
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Next-token prediction on a packed stream of text."""

    kind: str = "pretrain"
    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = variant("corpus", kind="generator")
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 1000
    batch_sequences: int = 64
    """Blocks per optimizer step, over all ranks."""
    block_tokens: int = 128
    """Tokens per block."""

    def check(self) -> None:
        positive(steps=self.steps, batch_sequences=self.batch_sequences, block_tokens=self.block_tokens)


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning on prompt-completion pairs, up to a target accuracy: the cold start."""

    kind: str = "sft"
    model: ModelConfig = field(default_factory=ModelConfig)
    pairs: PairsConfig = variant("pairs", kind="generator")
    prompts: PromptsConfig = variant("prompts", kind="generator")
    """For the accuracy that `target_accuracy` is compared with (held-out split)."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 1000
    """At most this many."""
    batch_sequences: int = 64
    target_accuracy: float = 0.0
    """Stop once sampled held-out accuracy reaches this; 0 makes all steps. A cold start for GRPO wants
    0.3 to 0.6: below there is nothing to reinforce, above nothing to learn."""
    check_every: int = 25
    """Steps between two looks at the accuracy."""
    check_with: EvaluateConfig = field(default_factory=lambda: EvaluateConfig(prompts=128, greedy=False))
    """How that accuracy is measured."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def check(self) -> None:
        positive(steps=self.steps, batch_sequences=self.batch_sequences, check_every=self.check_every)
        if not 0 <= self.target_accuracy <= 1:
            raise ConfigError(f"target_accuracy={self.target_accuracy} is no share between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """Reinforcement learning with verifiable rewards, over any group-relative objective."""

    kind: str = "grpo"
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = variant("prompts", kind="generator")
    objective: Objective = variant("objective", kind="grpo")
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 200
    prompts_per_step: int = 32
    group_size: int = 16
    """Samples per prompt, G."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Strings that end a completion, besides EOS."""
    staleness: int = 0
    """η: how many versions old a trained token may be. 0 is on-policy, 1 one step off, k fully asynchronous."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    shuffle_rewards: bool = False
    """A control: rewards are permuted over the samples of a step before credit is given. Accuracy must fall."""
    take_deadline_s: float = 900.0
    """Longest wait for one step's groups."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def check(self) -> None:
        positive(
            steps=self.steps,
            prompts_per_step=self.prompts_per_step,
            group_size=self.group_size,
            max_new_tokens=self.max_new_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A teacher answers training prompts; a student is fine-tuned on the verified answers."""

    kind: str = "distill"
    teacher: str = ""
    """Name of the earlier stage that teaches."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The student."""
    prompts: PromptsConfig = variant("prompts", kind="generator")
    asked_prompts: int = 2048
    samples_per_prompt: int = 1
    keep_per_prompt: int = 1
    """Different correct answers kept of one prompt."""
    temperature: float = 1.0
    max_new_tokens: int = 256
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 500
    batch_sequences: int = 64
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def check(self) -> None:
        positive(
            asked_prompts=self.asked_prompts,
            samples_per_prompt=self.samples_per_prompt,
            keep_per_prompt=self.keep_per_prompt,
            steps=self.steps,
            batch_sequences=self.batch_sequences,
        )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Hugging Face safetensors of an earlier stage, read back and evaluated again."""

    kind: str = "export"
    model: ModelConfig = field(default_factory=ModelConfig)


TrainedConfig = PretrainConfig | SftConfig | GrpoConfig | DistillConfig
StageConfig = TrainedConfig | ExportConfig
