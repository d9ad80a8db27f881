"""Settings of the learner: its processes (`GroupConfig`, one per run), and how a stage optimises
(`OptimConfig`, one per stage). A rank gets both as one `LearnerConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from treadle.platform.errors import ConfigError

BACKENDS = ("deepspeed", "torch")
DTYPES = ("fp32", "bf16")
SCHEDULES = ("constant", "linear", "cosine")
PACKINGS = ("packed", "padded")


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """By how many ranks the weights are trained, with what, and how long anyone may take."""

    backend: str = "deepspeed"
    """deepspeed, or torch (plain data parallelism; the reference the other is tested against)."""
    ranks: int = 2
    """Data-parallel processes, one Ray actor each."""
    zero: int = 2
    """ZeRO stage of DeepSpeed: what is partitioned over ranks. 1 optimizer, 2 and gradients, 3 and weights."""
    dtype: str = "fp32"
    """Dtype the model computes in, fp32 or bf16. Master weights and optimizer state are always fp32."""
    packing: str = "packed"
    """packed (no padding token is computed), or padded (for models with an attention of their own)."""
    max_tokens_per_microbatch: int = 8192
    """Upper bound of tokens per forward pass of a rank; a longer sequence gets a pass of its own."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""

    step_deadline_s: float = 600.0
    """Longest a step, a save or a load may take, and the time-out of every collective."""
    start_deadline_s: float = 180.0
    """Longest the ranks may take to start, to find each other and to load the model."""
    heartbeat_s: float = 5.0
    """How often each rank is asked what it is doing while a call is waited for."""
    silence_deadline_s: float = 60.0
    """A rank that does not answer that for so long is frozen, and the group is broken. The thread that answers is not
    the one that works, so a long step is no silence."""
    cpus: float = 1.0
    """Ray CPUs of a rank."""
    gpus: float = 0.0
    """Ray GPUs of a rank, 0 or 1."""
    accelerator: str = ""
    """Ray accelerator type a rank must run on; empty for any."""
    threads: int = 1
    """Threads of a rank's CPU kernels."""

    def check(self) -> None:
        """Raises ConfigError for a value, or a pair of values, that cannot work."""
        _choice("backend", self.backend, BACKENDS)
        _choice("dtype", self.dtype, DTYPES)
        _choice("packing", self.packing, PACKINGS)
        for name in ("ranks", "max_tokens_per_microbatch", "threads"):
            _at_least(f"learner.{name}", getattr(self, name), 1)
        _at_least("learner.cpus", self.cpus, 0.0)
        for name in ("step_deadline_s", "start_deadline_s", "heartbeat_s", "silence_deadline_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"learner.{name}={getattr(self, name)} must be above 0.")
        if self.zero not in (0, 1, 2, 3):
            raise ConfigError(f"learner.zero={self.zero} is no ZeRO stage.", "Use 0, 1, 2 or 3.")
        if self.backend == "deepspeed" and self.zero == 0 and self.dtype == "bf16":
            raise ConfigError(
                "learner.zero=0 with learner.dtype=bf16: DeepSpeed keeps no fp32 master weights there.",
                "Set learner.zero=1, or learner.backend=torch.",
            )
        if self.gpus not in (0.0, 1.0):
            raise ConfigError(f"learner.gpus={self.gpus}: a rank drives one GPU or none.")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How a stage optimises: AdamW, its schedule, and how often a step's batch is used."""

    lr: float = 1e-6
    """Peak learning rate."""
    schedule: str = "constant"
    """constant, linear or cosine decay to `min_lr_ratio * lr` at `total_steps`."""
    warmup_steps: int = 0
    """Steps of linear rise from lr/warmup_steps to lr."""
    total_steps: int = 0
    """Steps over which the rate decays; 0 for the steps of the stage. Unused by constant."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a part of `lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, of matrices and embeddings (not of biases and norms)."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    minibatches: int = 1
    """Optimizer updates per pass over a step's batch."""
    epochs: int = 1
    """Passes over a step's batch."""
    replace_reference_every: int = 0
    """Steps after which the KL reference becomes the policy of that moment; 0 never."""

    def check(self) -> None:
        """Raises ConfigError for a value, or a pair of values, that cannot work."""
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f"optim.schedule={self.schedule} is unknown.", f"Use one of: {', '.join(SCHEDULES)}."
            )
        for name in ("minibatches", "epochs"):
            _at_least(f"optim.{name}", getattr(self, name), 1)
        for name in ("warmup_steps", "total_steps", "replace_reference_every", "weight_decay", "grad_clip"):
            _at_least(f"optim.{name}", getattr(self, name), 0)
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be above 0.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas={self.betas} must be two numbers in [0, 1).")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"optim.min_lr_ratio={self.min_lr_ratio} must be in [0, 1].")
        if self.schedule != "constant" and 0 < self.total_steps <= self.warmup_steps:
            raise ConfigError(
                f"optim.schedule={self.schedule} with optim.total_steps={self.total_steps} and "
                f"optim.warmup_steps={self.warmup_steps} leaves nothing to decay over.",
                "Set optim.total_steps above optim.warmup_steps, or optim.schedule=constant.",
            )

    @property
    def updates_per_step(self) -> int:
        return self.minibatches * self.epochs

    def lr_at(self, step: int) -> float:
        """Learning rate of the step that makes version step+1. Warm-up reaches `lr` in its last step."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        span = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        if self.schedule == "linear":
            left = 1.0 - progress
        else:
            left = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * left)


@dataclass(frozen=True, kw_only=True)
class LearnerConfig(GroupConfig, OptimConfig):
    """All that a rank needs to know.

    Example: `LearnerConfig(**asdict(group), **asdict(optim))`.
    """

    def check(self) -> None:
        """Raises ConfigError for what either part refuses."""
        GroupConfig.check(self)
        OptimConfig.check(self)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"learner.{name}={value} is unknown.", f"Use one of: {', '.join(allowed)}.")


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"{name}={value} must be at least {least}.")
