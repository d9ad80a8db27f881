"""From metric rows to panels: which curves belong together, and what a stage did not record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from treadle.dashboards.charts import Series, Slice, figure, line_chart, stacked_bar
from treadle.platform import metric_names as names
from treadle.platform.tracking import MetricRow

TABLE_ROWS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A chart with its heading, the last value in large figures, a legend and the table behind it."""

    title: str
    unit: str
    last: str
    first: str
    chart: Markup
    legend: tuple[str, ...]
    header: tuple[str, ...]
    table: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Curves that share a panel. `names` are exact, or a prefix when they end with a slash."""

    title: str
    names: tuple[str, ...]
    from_zero: bool = True
    smooth: bool = True
    expected: bool = True  # whether its absence is worth a word in a stage that draws samples


PLANS = (
    Plan(title="Reward", names=(names.REWARD_MEAN,), from_zero=False),
    Plan(title="Reward parts", names=(names.REWARD_PART_PREFIX,)),
    Plan(title="Accuracy", names=(names.ACCURACY_SAMPLED, names.ACCURACY_GREEDY)),
    Plan(title="Response length", names=(names.RESPONSE_LENGTH_MEAN, names.RESPONSE_LENGTH_MAX)),
    Plan(title="Loss", names=(names.POLICY_LOSS,), from_zero=False),
    Plan(title="Entropy", names=(names.POLICY_ENTROPY,)),
    Plan(title="KL to the reference", names=(names.POLICY_KL,), from_zero=False),
    Plan(title="Gradient norm", names=(names.POLICY_GRAD_NORM,)),
    Plan(title="Engine–learner mismatch", names=(names.MISMATCH_KL,), from_zero=False),
    Plan(title="Staleness", names=(names.STALENESS_MEAN, names.STALENESS_MAX)),
    Plan(title="Throughput", names=(names.PERF_TOKENS_PER_S,)),
    Plan(title="Step time", names=(names.TIMING_STEP,)),
    Plan(title="Clipped tokens", names=(names.POLICY_CLIP_FRACTION,), expected=False),
    Plan(title="Cut by length", names=(names.RESPONSE_LENGTH_CLIP_RATIO,), expected=False),
    Plan(title="Groups without signal", names=(names.GROUPS_ZERO_STD,), expected=False),
    Plan(title="Learning rate", names=(names.POLICY_LR,), smooth=False, expected=False),
)

SERIAL_PHASES = (
    (names.TIMING_WAIT, "wait for samples"),
    (names.TIMING_LEARN, "learn"),
    (names.TIMING_PUBLISH, "publish"),
    (names.TIMING_CHECKPOINT, "checkpoint"),
    (names.TIMING_EVALUATE, "evaluate"),
)
BESIDE_PHASES = ((names.TIMING_GENERATE, "generate"), (names.TIMING_VERIFY, "verify"))


def series_of(rows: Sequence[MetricRow], name: str, label: str, *, smooth: bool) -> Series | None:
    """The curve of one metric; None if it was never finite."""
    points = [(row.step, row.metrics[name]) for row in rows if name in row.metrics]
    if not any(math.isfinite(value) for _, value in points):
        return None
    return Series(
        label=label,
        smooth=smooth,
        steps=tuple(step for step, _ in points),
        values=tuple(value for _, value in points),
    )


def _curves(rows: Sequence[MetricRow], plan: Plan) -> list[Series]:
    found = []
    for name in plan.names:
        if name.endswith("/"):
            members = dict.fromkeys(key for row in rows for key in row.metrics if key.startswith(name))
            found += [
                series_of(rows, member, member.removeprefix(name), smooth=plan.smooth) for member in members
            ]
        else:
            label = name.partition("/")[2] if len(plan.names) > 1 else plan.title.lower()
            found.append(series_of(rows, name, label, smooth=plan.smooth))
    return [one for one in found if one is not None]


def panels(stage: str, rows: Sequence[MetricRow]) -> tuple[list[Panel], list[str]]:
    """The panels of a stage, and the titles of those for which nothing was recorded."""
    shown, missing = [], []
    draws = any(names.REWARD_MEAN in row.metrics for row in rows)
    for index, plan in enumerate(PLANS):
        curves = _curves(rows, plan)
        if curves:
            shown.append(_panel(f"c-{_ident(stage)}-{index}", f"{plan.title}, {stage}", plan, curves))
        elif draws and plan.expected:
            missing.append(plan.title)
    return shown, missing


def _ident(stage: str) -> str:
    return "".join(char if char.isalnum() else f"_{ord(char):x}" for char in stage)


def _panel(ident: str, title: str, plan: Plan, curves: Sequence[Series]) -> Panel:
    first_name = plan.names[0]
    unit = names.unit_of(first_name if not first_name.endswith("/") else first_name + "x")
    main = curves[0]
    return Panel(
        title=plan.title,
        unit="" if unit in ("1", "fraction") else unit,
        last=figure(main.last) if len(curves) == 1 or len(plan.names) > 1 else "",
        first=figure(main.finite[0]) if len(curves) == 1 or len(plan.names) > 1 else "",
        chart=line_chart(ident, title, unit, curves, from_zero=plan.from_zero),
        legend=tuple(one.label for one in curves) if len(curves) > 1 else (),
        header=("step", *(one.label for one in curves)),
        table=_table(curves),
    )


def _table(curves: Sequence[Series]) -> tuple[tuple[str, ...], ...]:
    """About a dozen rows, evenly spread, always with the first and the last step."""
    steps = sorted({step for one in curves for step in one.steps})
    count = min(TABLE_ROWS, len(steps))
    chosen = [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]
    lookup = [dict(zip(one.steps, one.values, strict=True)) for one in curves]
    return tuple(
        (str(step), *(figure(values.get(step)) for values in lookup)) for step in dict.fromkeys(chosen)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Mean seconds per step of one phase, and its share of the step."""

    label: str
    kind: str
    mean_s: str
    share: str
    beside: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where a stage's time went."""

    stage: str
    bar: Markup
    phases: tuple[Phase, ...]
    steps: int
    step_s: str


def timing(stage: str, rows: Sequence[MetricRow]) -> Timing | None:
    """The division of the mean step; None if no step was timed. Phases the driver goes through one after the
    other add up to the step; drawing and judging run beside them."""
    timed = [row for row in rows if names.TIMING_STEP in row.metrics]
    step_s = _mean(timed, names.TIMING_STEP)
    if not timed or not step_s > 0:
        return None
    serial = [(label, _mean(timed, name), f"p{i}") for i, (name, label) in enumerate(SERIAL_PHASES)]
    serial = [(label, seconds, kind) for label, seconds, kind in serial if seconds > 0]
    rest = step_s - sum(seconds for _, seconds, _ in serial)
    if rest > 0.005 * step_s:
        serial.append(("other", rest, "p9"))
    beside = [(label, _mean(timed, name), f"q{i}") for i, (name, label) in enumerate(BESIDE_PHASES)]
    phases = [
        Phase(
            label=label, kind=kind, mean_s=figure(s), share=f"{s / step_s:.0%}", beside=kind.startswith("q")
        )
        for label, s, kind in [*serial, *(b for b in beside if b[1] > 0)]
    ]
    slices = [Slice(label=label, value=seconds, kind=kind) for label, seconds, kind in serial]
    bar = stacked_bar(f"t-{_ident(stage)}", f"Time of a mean step, {stage}", slices, "s")
    return Timing(stage=stage, bar=bar, phases=tuple(phases), steps=len(timed), step_s=figure(step_s))


def _mean(rows: Sequence[MetricRow], name: str) -> float:
    """Mean over all rows; a step that lacks the phase (no checkpoint) spent nothing on it."""
    values = [row.metrics.get(name, 0.0) for row in rows]
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else 0.0
