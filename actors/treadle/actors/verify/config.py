"""Settings of the verifier pool."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from treadle.actors.verify.registry import DEADLINES_S, VERIFIERS
from treadle.platform.errors import ConfigError
from treadle.platform.records import RoleSpec


@dataclass(frozen=True, kw_only=True)
class VerifierLimits:
    """`verify.limits.<verifier>.*`: what differs for one verifier."""

    deadline_s: float | None = None
    """Wall time for one completion; by default `verify.deadline_s`, for `code` and `judge` 30 s."""
    processes: int | None = None
    """Most processes of an actor that judge with it at once; by default all."""


@dataclass(frozen=True)
class VerifyConfig:
    """`verify.*`: how completions are judged, and what a verifier may use up."""

    actors: int = 1
    """Verify actors. Each holds its own processes."""
    processes: int = 2
    """Killable processes per actor; as many samples are judged at once."""
    max_processes: int = 0
    """Up to so many per actor while completions wait for longer than `queue_age_s`: hostile ones hold processes until
    their deadline. 0 is four times `processes`."""
    queue_age_s: float = 0.25
    """Longest wait for a process that is thought normal."""
    idle_s: float = 60.0
    """A process beyond `processes` that has had nothing to do for this long is ended."""
    shed_after: float = 0.05
    """Share of its deadline after which a completion counts as stuck: those behind it go to another process."""
    cpus: float = 1.0
    """Logical CPUs that each actor reserves, its processes included."""
    parts: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 0.1})
    """Weight of each reward part; the reward is the weighted sum. `accuracy` comes from the prompt's verifier. A form
    part (see `registry.FORM`) is judged on every completion where it is listed; with weight 0 it is only logged."""
    eos: str = ""
    """Text of the EOS token. It may close a completion and stand nowhere else."""
    think_opened: bool = False
    """Prompts end with `<think>`, so completions begin inside the thinking."""
    custom: dict[str, str] = field(default_factory=dict)
    """Further verifiers: name to `module:attribute`, a callable that makes a Verifier."""
    pass_environment: list[str] = field(default_factory=list)
    """Environment variables that verifier processes get besides a handful of harmless ones: a judge model's token."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Keyword arguments of verifiers, by name: `verify.options.math.allow_unevaluated=true`."""
    pins: dict[str, str] = field(default_factory=dict)
    """Versions that verifiers must have, as verdicts name them: `verify.pins.math="1 (math-verify 0.9.0, …)"`. A run
    whose machine has another one does not start."""
    cache_entries: int = 4096
    """Verdicts of deterministic verifiers that an actor remembers by content; 0 judges everything anew."""
    limits: dict[str, VerifierLimits] = field(default_factory=dict)
    """Deadlines and concurrency of single verifiers, by name: `verify.limits.code.deadline_s=30`."""
    warm: list[str] = field(default_factory=list)
    """Verifiers that every process builds before the first completion arrives, by name."""
    deadline_s: float = 2.0
    """Wall time for one completion. Past it the process is killed and the verdict is timed_out."""
    startup_deadline_s: float = 120.0
    """Wall time for a process to start and import what a verifier needs."""
    hedge_after_s: float = 0.0
    """A group that an actor has not answered by then is also given to another one, and the first answer counts: for
    slow nodes. 0 never does."""
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
        if 0 != self.max_processes < self.processes:
            raise ConfigError(
                f"verify.max_processes={self.max_processes} is below verify.processes={self.processes}.",
                f"Set verify.max_processes={self.processes} for a fixed number.",
            )
        for name in (
            "deadline_s",
            "startup_deadline_s",
            "judge_deadline_s",
            "queue_age_s",
            "idle_s",
            "shed_after",
        ):
            value = getattr(self, name)
            if not (isfinite(value) and value > 0):
                raise ConfigError(f"verify.{name}={value} must be finite and above 0.")
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
        for name in ("cpus", "respawns", "cache_entries", "hedge_after_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"verify.{name}={getattr(self, name)} must not be negative.")
        self._check_parts()
        self._check_names()
        self._check_limits()

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
        for where, named in (("options", self.options), ("limits", self.limits), ("pins", self.pins)):
            for name in named:
                self.check_verifier(name, f"verify.{where}")

    def _check_limits(self) -> None:
        for name, limits in self.limits.items():
            where = f"verify.limits.{name}"
            if limits.processes is not None and limits.processes < 1:
                raise ConfigError(f"{where}.processes={limits.processes} must be at least 1.")
            if limits.deadline_s is None:
                continue
            if not 0 < limits.deadline_s < self.judge_deadline_s:
                raise ConfigError(
                    f"{where}.deadline_s={limits.deadline_s} must lie between 0 and "
                    f"verify.judge_deadline_s={self.judge_deadline_s}.",
                    "A group takes at least as long as its slowest completion.",
                )

    @property
    def most_processes(self) -> int:
        """`max_processes`, resolved."""
        return self.max_processes or 4 * self.processes

    def caps(self) -> dict[str, int]:
        """The most processes of an actor per verifier, where that is limited."""
        return {n: limits.processes for n, limits in self.limits.items() if limits.processes is not None}

    def deadlines_s(self) -> dict[str, float]:
        """The deadlines that differ from `deadline_s`, by verifier."""
        given = {n: limits.deadline_s for n, limits in self.limits.items() if limits.deadline_s is not None}
        return {**DEADLINES_S, **given}

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
