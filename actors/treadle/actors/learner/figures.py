"""Figures of a step: summed per rank, merged once over ranks, averaged over all drawn tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treadle.platform import metric_names as names
from treadle.platform.records import StepReport, WeightVersion

PREFIX = "policy/"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """One rank's part of a step. `sums` are over its drawn tokens (and passes), `maxima` over the same.

    Example: sums {"policy/entropy": 211.3} and tokens 320 on one rank, {"policy/entropy": 190.1} and 300 on
    the other: the step's policy/entropy is 401.4 / 620.
    """

    loss: float
    tokens: int  # drawn tokens, counted once per pass over the batch
    sequence_tokens: int  # tokens of whole sequences, counted once
    microbatches: int
    sums: Mapping[str, float]
    maxima: Mapping[str, float]
    grad_norm: float
    lr: float
    skipped: str
    wall_s: float


@dataclass
class Figures:
    """Sums over a rank's micro-batches, kept on the device until the step ends."""

    _sums: dict[str, Tensor] = field(default_factory=dict)
    _maxima: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    microbatches: int = 0

    def add(self, name: str, values: Tensor) -> None:
        """Values of a micro-batch's drawn tokens, any float dtype; their sum is taken in fp64."""
        total = values.detach().sum(dtype=torch.float64)
        self._sums[name] = self._sums[name] + total if name in self._sums else total

    def largest(self, name: str, values: Tensor) -> None:
        value = values.detach().max()
        self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def sums(self) -> dict[str, float]:
        return _to_floats(self._sums)

    def maxima(self) -> dict[str, float]:
        return _to_floats(self._maxima)


def _to_floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    """One transfer from the device for all figures."""
    if not values:
        return {}
    flat = torch.stack([value.double() for value in values.values()]).tolist()
    return dict(zip(values, flat, strict=True))


def mismatch(figures: Figures, learner: Tensor, engine: Tensor) -> None:
    """Adds how far the engine that drew the tokens is from the learner. KL(engine‖learner) is estimated by
    Schulman's k3, exp(r) - 1 - r with r = log(learner/engine): unbiased on the engine's tokens, never
    negative (http://joschu.net/blog/kl-approx.html)."""
    r = learner.double() - engine.double()
    figures.add(names.MISMATCH_KL, torch.expm1(r) - r)
    figures.largest(names.MISMATCH_MAX, r.abs())


def merge(step: int, ranks: Sequence[RankReport], wall_s: float) -> StepReport:
    """The step's report from all ranks' parts."""
    tokens = sum(rank.tokens for rank in ranks)
    sequence_tokens = sum(rank.sequence_tokens for rank in ranks)
    metrics = {
        name: sum(rank.sums.get(name, 0.0) for rank in ranks) / max(tokens, 1)
        for name in dict.fromkeys(name for rank in ranks for name in rank.sums)
    }
    for name in dict.fromkeys(name for rank in ranks for name in rank.maxima):
        metrics[name] = max(rank.maxima[name] for rank in ranks if name in rank.maxima)
    slowest = max(rank.wall_s for rank in ranks)
    metrics |= {
        names.POLICY_LOSS: sum(rank.loss for rank in ranks),
        names.POLICY_GRAD_NORM: ranks[0].grad_norm,
        names.POLICY_LR: ranks[0].lr,
        names.PERF_TOKENS: float(sequence_tokens),
        names.PERF_TOKENS_PER_S: sequence_tokens / wall_s if wall_s > 0 else 0.0,
        "perf/microbatches": float(sum(rank.microbatches for rank in ranks)),
        "perf/rank_balance": sum(rank.wall_s for rank in ranks) / (len(ranks) * slowest) if slowest else 1.0,
    }
    skipped = next(
        (f"{rank.skipped} (rank {i})" for i, rank in enumerate(ranks) if "loss" in rank.skipped), ""
    )
    return StepReport(
        step=step,
        version=WeightVersion(step=step + 1),
        metrics=metrics,
        tokens=tokens,
        wall_s=wall_s,
        skipped=skipped or ranks[0].skipped,
    )
