"""A small configuration schema with everything the loader knows: unions, nesting, lists, mappings."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from treadle.platform.config import variant, variant_map, variants
from treadle.platform.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Plain:
    kind: str = "plain"
    clip: float = 0.2
    kl: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Fancy:
    kind: str = "fancy"
    clip: float = 0.28
    dynamic: bool = True


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)

    def check(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"lr={self.lr} must be above 0.", "Set lr.")


@dataclass(frozen=True, kw_only=True)
class Fit:
    kind: str = "fit"
    steps: int = 10
    optim: Optim = field(default_factory=lambda: Optim(lr=2e-3))


@dataclass(frozen=True, kw_only=True)
class Draw:
    kind: str = "draw"
    steps: int = 5
    objective: Plain | Fancy = variant("test-objective", kind="plain")
    files: list[str] = field(default_factory=list)
    warmup: Optim | None = None


class Mode(StrEnum):
    FAST = "fast"
    SLOW = "slow"


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    seed: int = 0
    out: str = "runs/${name}"
    note: str | None = None
    mode: Mode = Mode.FAST
    where: Literal["here", "there"] = "here"
    stages: dict[str, Fit | Draw] = variant_map("test-stage")
    weights: dict[str, float] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()


variants("test-objective", {"plain": Plain, "fancy": Fancy})
variants("test-stage", {"fit": Fit, "draw": Draw})

TEXT = """\
name: tiny
seed: 3
weights: {a: 1e-4, b: 2}
stages:
  sft: {kind: fit, steps: 3, optim: {lr: 1e-4}}
  rl:
    kind: draw
    objective:
      clip: 0.1
      kl: 1e-3
"""
