"""Settings of the verifier pool."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from treadle.actors.verify.registry import VERIFIERS
from treadle.platform.errors import ConfigError
from treadle.platform.records import RoleSpec


@dataclass(frozen=True)
class VerifyConfig:
    """`verify.*`: how completions are judged, and what a verifier may use up."""

    actors: int = 1
    """Verify actors. Each holds its own processes."""
    processes: int = 2
    """Killable processes per actor; as many samples are judged at once."""
    cpus: float = 1.0
    """Logical CPUs that each actor reserves, its processes included."""
    parts: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 0.1})
    """Weight of each reward part; the reward is the weighted sum. `format` adds the R1 template."""
    eos: str = ""
    """Text of the EOS token. It may close a completion and stand nowhere else."""
    think_opened: bool = False
    """Prompts end with `<think>`, so completions begin inside the thinking."""
    custom: dict[str, str] = field(default_factory=dict)
    """Further verifiers: name to `module:attribute`, a callable without arguments that makes a Verifier."""
    warm: list[str] = field(default_factory=list)
    """Verifiers that every process builds before the first completion arrives, by name."""
    deadline_s: float = 2.0
    """Wall time for one completion. Past it the process is killed and the verdict is timed_out."""
    startup_deadline_s: float = 120.0
    """Wall time for a process to start and import what a verifier needs."""
    judge_deadline_s: float = 120.0
    """Wall time for one group, waiting for a free process included."""
    memory_bytes: int = 2**30
    """Address space of each process."""
    batch_samples: int = 32
    """Most completions handed to a process at a time, of one or several groups."""
    queue_batches: int = 64
    """Batches that wait in an actor; beyond it the callers wait."""
    respawns: int = 8
    """Verify actors that may be replaced in a run."""

    def check(self) -> None:
        """Raises `ConfigError` for what cannot work."""
        for name in ("actors", "processes", "batch_samples", "queue_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"verify.{name}={getattr(self, name)} must be at least 1.")
        for name in ("deadline_s", "startup_deadline_s", "judge_deadline_s"):
            value = getattr(self, name)
            if not (isfinite(value) and value > 0):
                raise ConfigError(f"verify.{name}={value} must be a finite number of seconds above 0.")
        if self.judge_deadline_s <= self.deadline_s:
            raise ConfigError(
                f"verify.judge_deadline_s={self.judge_deadline_s} must exceed "
                f"verify.deadline_s={self.deadline_s}.",
                "A group takes at least as long as its slowest completion.",
            )
        if self.memory_bytes < 128 * 2**20:
            raise ConfigError(
                f"verify.memory_bytes={self.memory_bytes} is too little for a Python process.",
                "Set at least 134217728 (128 MiB); the math verifier needs 512 MiB.",
            )
        if self.cpus < 0 or self.respawns < 0:
            raise ConfigError(
                f"verify.cpus={self.cpus} and verify.respawns={self.respawns} must not be negative."
            )
        self._check_parts()
        self._check_names()

    def _check_parts(self) -> None:
        if not any(self.parts.values()):
            raise ConfigError(
                "verify.parts gives every reward part the weight 0.", "Set verify.parts.accuracy=1."
            )
        for name, weight in self.parts.items():
            if not isfinite(weight):
                raise ConfigError(f"verify.parts.{name}={weight} must be finite.")

    def _check_names(self) -> None:
        for name, path in self.custom.items():
            if name in VERIFIERS:
                raise ConfigError(
                    f"verify.custom.{name} hides the built-in verifier.", "Choose another name."
                )
            module, _, attribute = path.partition(":")
            if not module or not attribute.isidentifier():
                raise ConfigError(f"verify.custom.{name}={path!r} is not `module:attribute`.")
        for name in self.warm:
            self.check_verifier(name, "verify.warm")

    def role(self) -> RoleSpec:
        """What the verify actors need from the cluster."""
        return RoleSpec(role="verify", count=self.actors, cpus=self.cpus)

    def check_verifier(self, name: str, where: str) -> None:
        """Raises `ConfigError` when no verifier has this name; `where` says who asks for it."""
        known = sorted({*VERIFIERS, *self.custom})
        if name not in known:
            raise ConfigError(
                f"{where} names the verifier {name!r}, which does not exist.",
                f"Use one of {', '.join(known)}, or add it under verify.custom.",
            )
