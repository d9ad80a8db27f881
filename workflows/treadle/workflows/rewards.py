"""A stage's reward: how the parts of a verdict are weighed, and over which steps.

The verifier pool weighs parts with `verify.parts`, the same for the whole run. A stage may change weights from a step
on (R1 adds language consistency late), and may hand the parts to the objective one by one (GDPO).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from treadle.platform.errors import ConfigError
from treadle.platform.objectives.base import ScoredGroup
from treadle.platform.records import Drawn, StopReason, Verdict, VerdictStatus


@dataclass(frozen=True, kw_only=True)
class RewardPhase:
    """Weights that hold from a step on, until a later phase changes them again."""

    from_step: int = 0
    """First step. A group counts by the step it was issued in."""
    parts: dict[str, float] = field(default_factory=dict)
    """Weights that differ from `verify.parts`."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """`stages.<name>.reward.*`."""

    per_part: bool = False
    """Standardise every part within its group before they are summed (GDPO, arXiv 2601.05242). One standard deviation
    over the sum makes different mixtures of right, well formed and fluent look the same."""
    phases: tuple[RewardPhase, ...] = ()
    """Changes of weights, in order of their steps."""

    def check(self, where: str, parts: Mapping[str, float]) -> None:
        """Raises `ConfigError` for phases out of order, or that weigh a part nobody gives."""
        steps = [phase.from_step for phase in self.phases]
        if steps != sorted(set(steps)) or any(step < 0 for step in steps):
            raise ConfigError(
                f"{where}.phases begin at the steps {', '.join(map(str, steps))}.",
                "Give each phase a later from_step than the one before.",
            )
        for index, phase in enumerate(self.phases):
            for name in phase.parts:
                if name not in parts:
                    raise ConfigError(
                        f"{where}.phases[{index}].parts.{name}: no verdict has this part.",
                        f"Add verify.parts.{name} (0 logs it only), or use one of {', '.join(parts)}.",
                    )


class RewardRule:
    """Applies a `RewardConfig`. `weights` are `verify.parts`; without phases the pool's rewards stay as they are.

    Example: `RewardRule(RewardConfig(phases=(RewardPhase(from_step=100, parts={"language": 0.2}),)),
    {"accuracy": 1.0, "language": 0.0})`.
    """

    def __init__(
        self, config: RewardConfig | None = None, weights: Mapping[str, float] | None = None
    ) -> None:
        self._config = config or RewardConfig()
        self._weights = dict(weights or {})

    def weights(self, step: int) -> Mapping[str, float]:
        """Of groups issued at `step`."""
        found = dict(self._weights)
        for phase in self._config.phases:
            if phase.from_step <= step:
                found |= phase.parts
        return found

    def weighed(self, drawn: Drawn, verdicts: Sequence[Verdict]) -> tuple[Verdict, ...]:
        """The verdicts with the reward that holds for their group."""
        if not self._config.phases:
            return tuple(verdicts)
        weights = self.weights(drawn.oldest.step)
        return tuple(
            replace(v, reward=sum(weights.get(name, 0.0) * value for name, value in v.parts))
            if v.status is VerdictStatus.SCORED
            else v
            for v in verdicts
        )

    def outcome(self, drawn: Drawn, verdicts: Sequence[Verdict], max_new_tokens: int) -> ScoredGroup:
        """The group as the objective sees it: a failed or timed-out sample is NaN, never zero."""
        group = ScoredGroup(
            rewards=np.array([v.reward for v in verdicts], dtype=np.float64),
            lengths=np.array(drawn.lengths, dtype=np.int64),
            truncated=np.array([s is StopReason.LENGTH for s in drawn.stops], dtype=np.bool_),
            max_new_tokens=max_new_tokens,
        )
        if not self._config.per_part:
            return group
        weights = self.weights(drawn.oldest.step)
        names = sorted({name for v in verdicts for name, _ in v.parts if weights.get(name)})
        rows = [dict(v.parts) for v in verdicts]
        return replace(
            group,
            parts=np.array([[row.get(name, np.nan) for name in names] for row in rows], dtype=np.float64),
            part_weights=np.array([weights[name] for name in names], dtype=np.float64),
        )
