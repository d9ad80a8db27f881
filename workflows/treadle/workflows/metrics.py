"""The figures of one GRPO step, under the names of `metric_names`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from treadle.platform import metric_names as names
from treadle.platform.records import PublishReport, StepReport, StopReason, VerdictStatus
from treadle.workflows.evaluate import correctness
from treadle.workflows.stream import Ready, verdict_counts


class StepClock:
    """Seconds per phase of the current step. `with clock("learn"): …`; `lap()` returns and resets."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        self._since = time.monotonic()
        self._doing = ("", self._since)

    @property
    def doing(self) -> tuple[str, float]:
        """The phase under way, empty between two, and for how many seconds."""
        phase, since = self._doing
        return phase, time.monotonic() - since

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        self._doing = (phase, start)
        try:
            yield
        finally:
            self._doing = ("", time.monotonic())
            self._spent[phase] = self._spent.get(phase, 0.0) + time.monotonic() - start

    def lap(self) -> dict[str, float]:
        """Seconds of every phase since the last lap, and of the whole step."""
        now = time.monotonic()
        spent = {f"timing_s/{phase}": seconds for phase, seconds in self._spent.items()}
        spent["timing_s/step"] = now - self._since
        self._spent, self._since = {}, now
        return spent


def step_metrics(
    groups: Sequence[Ready],
    report: StepReport,
    published: PublishReport,
    timings: Mapping[str, float],
    dropped: Mapping[str, int],
) -> dict[str, float]:
    """Everything worth plotting about a step: rewards, lengths, staleness, counts, the learner's own metrics."""
    lengths = np.array([n for g in groups for n in g.drawn.lengths], dtype=np.float64)
    stops = [stop for g in groups for stop in g.drawn.stops]
    ages = np.array([report.step - g.drawn.oldest.step for g in groups], dtype=np.float64)
    counts = verdict_counts(groups)
    step_s = timings["timing_s/step"]
    drawn_tokens = float(lengths.sum())
    return {
        **reward_metrics(groups),
        **verify_metrics(groups),
        names.RESPONSE_LENGTH_MEAN: float(lengths.mean()),
        names.RESPONSE_LENGTH_MAX: float(lengths.max()),
        names.RESPONSE_LENGTH_CLIP_RATIO: sum(stop is StopReason.LENGTH for stop in stops) / len(stops),
        names.STALENESS_MEAN: float(ages.mean()),
        names.STALENESS_MAX: float(ages.max()),
        names.SAMPLES_FAILED: float(counts[VerdictStatus.FAILED]),
        names.SAMPLES_TIMED_OUT: float(counts[VerdictStatus.TIMED_OUT]),
        names.SAMPLES_DROPPED: float(sum(dropped.values())),
        names.PERF_TOKENS_PER_S: drawn_tokens / step_s if step_s > 0 else 0.0,
        names.SAMPLES_TRAINED: float(
            len(lengths) - counts[VerdictStatus.FAILED] - counts[VerdictStatus.TIMED_OUT]
        ),
        names.TIMING_GENERATE: max(g.drawn.wall_s for g in groups),
        names.TIMING_VERIFY: sum(v.wall_s for g in groups for v in g.verdicts),
        **timings,
        **report.metrics,
        **published.metrics,
        names.WEIGHTS_SENT_BYTES: float(published.sent_bytes),
        names.WEIGHTS_BEHIND: float(len(published.behind)),
    }


def verify_metrics(groups: Sequence[Ready]) -> dict[str, float]:
    """How long judging took per sample. A verdict from the pool's cache took none."""
    walls_s = np.array([v.wall_s for g in groups for v in g.verdicts])
    p50_s, p95_s, p99_s = (float(value) for value in np.percentile(walls_s, (50, 95, 99)))
    return {
        names.VERIFY_P50: p50_s,
        names.VERIFY_P95: p95_s,
        names.VERIFY_P99: p99_s,
        names.VERIFY_CACHED: float((walls_s == 0).mean()),
    }


def reward_metrics(groups: Sequence[Ready]) -> dict[str, float]:
    """Mean and spread over scored samples only; per part; the share of groups without any spread."""
    rewards = np.concatenate([g.outcome.rewards for g in groups])
    scored = rewards[~np.isnan(rewards)]
    flat = [bool(np.ptp(r) == 0) for g in groups if len(r := g.outcome.rewards[~np.isnan(g.outcome.rewards)])]
    marks = [mark for g in groups for mark in correctness(g.verdicts)]
    figures = {
        names.REWARD_MEAN: float(scored.mean()) if len(scored) else float("nan"),
        names.REWARD_STD: float(scored.std()) if len(scored) else float("nan"),
        names.GROUPS_ZERO_STD: sum(flat) / max(1, len(flat)),
        names.ACCURACY_SAMPLED: sum(marks) / max(1, len(marks)),
    }
    parts: dict[str, list[float]] = {}
    for g in groups:
        for verdict in g.verdicts:
            for name, value in verdict.parts if verdict.status is VerdictStatus.SCORED else ():
                parts.setdefault(name, []).append(value)
    figures.update({names.reward_part(name): sum(values) / len(values) for name, values in parts.items()})
    return figures
