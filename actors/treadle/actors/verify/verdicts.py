"""Making and counting verdicts."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from treadle.platform.records import Verdict, VerdictStatus

_KEPT = 4096


def scored(
    parts: tuple[tuple[str, float], ...], weights: Mapping[str, float], wall_s: float, verifier: str
) -> Verdict:
    """The reward is the weighted sum of the parts; one without a weight is only logged."""
    return Verdict(
        status=VerdictStatus.SCORED,
        reward=sum(weights.get(name, 0.0) * value for name, value in parts),
        parts=parts,
        wall_s=wall_s,
        detail="",
        verifier=verifier,
    )


def unscored(status: VerdictStatus, wall_s: float, detail: str, verifier: str) -> Verdict:
    """A verdict without a reward: NaN, so that no mean can take it for a zero."""
    return Verdict(
        status=status, reward=float("nan"), parts=(), wall_s=wall_s, detail=detail, verifier=verifier
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyStats:
    """Verdicts by status since the start; seconds per completion over the last 4096 of them (0 when none); and the
    state of the queue and the processes, where there are some."""

    scored: int
    failed: int
    timed_out: int
    p50_s: float
    p95_s: float
    p99_s: float
    processes: int = 0
    restarts: int = 0
    waiting_samples: int = 0
    queue_age_s: float = 0.0
    cache_hits: int = 0


class VerdictCounter:
    """Counts verdicts as they pass."""

    def __init__(self) -> None:
        self._counts: Counter[VerdictStatus] = Counter()
        self._walls_s: deque[float] = deque(maxlen=_KEPT)

    def add(self, verdicts: Iterable[Verdict]) -> None:
        for verdict in verdicts:
            self._counts[verdict.status] += 1
            self._walls_s.append(verdict.wall_s)

    def stats(self) -> VerifyStats:
        walls_s = np.array(self._walls_s or [0.0])
        p50_s, p95_s, p99_s = (float(value) for value in np.percentile(walls_s, (50, 95, 99)))
        return VerifyStats(
            scored=self._counts[VerdictStatus.SCORED],
            failed=self._counts[VerdictStatus.FAILED],
            timed_out=self._counts[VerdictStatus.TIMED_OUT],
            p50_s=p50_s,
            p95_s=p95_s,
            p99_s=p99_s,
        )
