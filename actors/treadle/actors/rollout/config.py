"""Settings of the rollout workers."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.actors.rollout.engines import ENGINES
from treadle.platform.errors import ConfigError
from treadle.platform.records import RoleSpec

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How groups are drawn. The samples depend on `engine`, `device`, `dtype` and `threads`, never on the
    number of workers; with the torch engine on a CPU they do not depend on `slots` either."""

    engine: str = "torch"
    """A name of `engines.ENGINES`."""
    workers: int = 1
    slots: int = 96
    """Sequences a worker draws at once; a multiple of `row_block`. More queue up and refill finished rows."""
    row_block: int = 8
    """Rows are computed in multiples of this many, so that a nearly empty batch does not pay for all
    slots."""
    max_context_tokens: int = 512
    """Longest prompt plus completion."""
    kv_step_tokens: int = 32
    """The KV cache grows, and decode attention runs, in steps of this many tokens; a multiple of 16. Larger
    is faster on long contexts (a GPU wants 512), smaller wastes less on short ones."""
    prefill_tokens: int = 4096
    """Most tokens (padding included) of one prefill or probe forward."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    dtype: str = "float32"
    """Of weights and KV cache; the learner publishes in the same."""
    threads: int = 1
    """CPU threads of one worker's engine."""

    cpus: float = 1.0
    """Of one worker."""
    gpus: float = 0.0
    """Of one worker."""
    accelerator: str = ""
    """Ray accelerator type a worker asks for, e.g. `H100`; empty takes any."""

    start_deadline_s: float = 300.0
    """From asking for a worker until it holds a model; also for switching to another model."""
    draw_deadline_s: float = 600.0
    """From issue to drawn group, replacements of workers included."""
    stage_deadline_s: float = 120.0
    """For fetching a version's buckets, and for adopting them."""
    heartbeat_s: float = 2.0
    """How often each worker is asked for its status."""
    silence_deadline_s: float = 60.0
    """A worker that neither answers nor makes progress for this long is killed and replaced."""
    drain_deadline_s: float = 60.0
    """How long a worker that leaves may finish what it draws; the rest is drawn elsewhere, under the same ids."""
    max_restarts: int = 3
    """Replacements of workers within `restart_window_s`; one more fails the run."""
    restart_window_s: float = 600.0

    def check(self) -> None:
        """Raises `ConfigError` naming the dotted setting."""
        if self.engine not in ENGINES:
            raise ConfigError(f"rollout.engine={self.engine}.", f"Set one of {', '.join(ENGINES)}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"rollout.dtype={self.dtype}.", f"Set one of {', '.join(DTYPES)}.")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"rollout.device={self.device}.", "Set cpu or cuda.")
        if self.device == "cuda" and self.gpus <= 0:
            raise ConfigError("rollout.device=cuda with rollout.gpus=0.", "Set rollout.gpus to 1.")
        self._check_counts()
        self._check_durations()

    def _check_counts(self) -> None:
        counts = ("workers", "slots", "row_block", "max_context_tokens", "kv_step_tokens", "prefill_tokens")
        for name in (*counts, "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.{name}={getattr(self, name)}.", "Set it to at least 1.")
        if self.row_block % 4 or self.slots % self.row_block:
            raise ConfigError(
                f"rollout.slots={self.slots} with rollout.row_block={self.row_block}.",
                "Set row_block to a multiple of 4 and slots to a multiple of row_block.",
            )
        if self.kv_step_tokens % 16:
            raise ConfigError(
                f"rollout.kv_step_tokens={self.kv_step_tokens} is no multiple of 16.", "Set it to 32 or 64."
            )
        if self.max_restarts < 0 or self.cpus < 0 or self.gpus < 0:
            raise ConfigError(
                "rollout: max_restarts, cpus or gpus is negative.",
                "Set rollout.max_restarts, cpus, gpus >= 0.",
            )

    def _check_durations(self) -> None:
        names = ("start_deadline_s", "draw_deadline_s", "stage_deadline_s", "heartbeat_s")
        for name in (*names, "silence_deadline_s", "drain_deadline_s", "restart_window_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"rollout.{name}={getattr(self, name)}.", "Set seconds above 0.")
        if self.silence_deadline_s < 2 * self.heartbeat_s:
            raise ConfigError(
                f"rollout.silence_deadline_s={self.silence_deadline_s} is less than two heartbeats "
                f"(rollout.heartbeat_s={self.heartbeat_s}).",
                "Raise silence_deadline_s or lower heartbeat_s.",
            )

    def role(self) -> RoleSpec:
        """What the workers need from the cluster."""
        return RoleSpec(
            role="rollout", count=self.workers, cpus=self.cpus, gpus=self.gpus, accelerator=self.accelerator
        )
