"""The run report: one HTML file that needs nothing but itself, written from the run folder alone."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from treadle.dashboards.charts import Slice, figure, interval_mark, stacked_bar
from treadle.dashboards.completions import blocks
from treadle.dashboards.panels import panels, timing
from treadle.dashboards.rundata import Account, Accuracy, Answer, Reader, RunData, accuracies, number
from treadle.dashboards.weights import SECONDS, weights_of
from treadle.platform.errors import DataError
from treadle.platform.records import Json
from treadle.platform.tracking import EventRow, MetricRow
from treadle.platform.tracking.console import duration

REPORT_FILE = "report.html"
CHAINS_SHOWN = 10
ROLLOUTS_SHOWN = 8
FAILURES_SHOWN = 50
_WORDS = {
    "failure": "failure",
    "skipped": "step skipped",
    "recovery": "mended",
    "replaced": "process replaced",
    "oom_backoff": "setting lowered",
    "quarantined": "prompt set aside",
}
"""Events that the table of failures lists, and what it calls them."""
ACCENTS = 6
"""Stage colours in the style sheet; a seventh stage starts over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A line of the header: `full` is the unabridged value, for the title."""

    label: str
    value: str
    full: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """A stage's part of the run; `accent` is its colour's number."""

    stage: str
    accent: int
    wall: str
    share: float


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into the run folder and returns its path. Raises `DataError` if there is no such
    folder; pieces that are missing or damaged are named on the page."""
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a folder.", "Name the folder of a run.")
    target = run_dir / REPORT_FILE
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        unfinished.write_text(render(Reader(run_dir).read()), encoding="utf-8", errors="replace")
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def render(data: RunData) -> str:
    """The page's text. Everything that comes from the run is escaped by the template engine."""
    environment = Environment(
        loader=PackageLoader("treadle.dashboards"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "three": _three, "blocks": blocks, "reward": _reward}
    accents = _accents(data)
    shown = {stage: panels(stage, _rows(data, stage)) for stage in data.stages}
    return environment.get_template("report.html.j2").render(
        name=_name(data),
        status=_status(data),
        facts=_facts(data),
        strip=_strip(data, accents),
        accents=accents,
        accuracies=[(one, _mark(one)) for one in accuracies(data.summary)],
        stages=[(stage, *shown[stage]) for stage in data.stages if shown[stage][0]],
        timings=[t for t in (timing(stage, _rows(data, stage)) for stage in data.stages) if t is not None],
        weights=[
            w for w in (weights_of(stage, _rows(data, stage)) for stage in data.stages) if w is not None
        ],
        weights_seconds=SECONDS,
        account=data.account,
        account_bar=_account_bar(data.account),
        samples=_samples(data.summary),
        failures=_failures(data.events),
        failures_hidden=max(0, len(_failure_events(data.events)) - FAILURES_SHOWN),
        events_known=bool(data.events),
        changes=data.changes,
        settings=data.settings,
        chains=None if data.chains is None else list(data.chains)[:CHAINS_SHOWN],
        rollouts=[kept for kept in data.rollouts if kept.stage in accents][-ROLLOUTS_SHOWN:],
        notes=data.notes,
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        css=Markup(environment.get_template("report.css").render()),
    )


def _rows(data: RunData, stage: str) -> list[MetricRow]:
    return [row for row in data.rows if row.stage == stage]


def _accents(data: RunData) -> dict[str, int]:
    """A colour number per stage; a stage that was only evaluated, or only answered, gets one too."""
    answered = [answer.stage for chain in data.chains or () for answer in chain.answers]
    stages = dict.fromkeys([*data.stages, *(one.stage for one in accuracies(data.summary)), *answered])
    return {stage: index % ACCENTS for index, stage in enumerate(stages)}


def _starts(data: RunData) -> list[EventRow]:
    return [event for event in data.events if event.kind == "run_start"]


def _name(data: RunData) -> str:
    named = data.summary.get("name") or next((e.fields.get("name") for e in _starts(data)), None)
    return str(named or data.folder.resolve().name)


def _status(data: RunData) -> str:
    """What the run folder says last: its own state, else the last end event, else that there was none."""
    told = data.summary.get("status") or data.state.get("state")
    if told:
        return str(told)
    last = next((e for e in reversed(data.events) if e.kind in ("run_start", "run_end")), None)
    if last is None:
        return "unknown"
    return str(last.fields.get("status", "ended")) if last.kind == "run_end" else "running, or killed"


def _facts(data: RunData) -> list[Fact]:
    summary = data.summary
    digest = str(summary.get("weights_digest") or "")
    starts = _starts(data)
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(starts[0].time)) if starts else ""
    facts = [
        Fact(label="wall time", value=_seconds(summary.get("wall_s"))),
        Fact(label="first step after", value=_seconds(summary.get("time_to_first_step_s"))),
        Fact(label="optimizer steps", value=_steps(data)),
        Fact(label="attempts", value=str(max((e.attempt for e in starts), default=0) or "")),
        Fact(label="started", value=began),
        Fact(label="Treadle", value=str(starts[-1].fields.get("version", "")) if starts else ""),
        Fact(label="weights digest", value=digest[:12], full=digest),
    ]
    return [fact if fact.value else Fact(label=fact.label, value="–") for fact in facts]


def _seconds(value: Json) -> str:
    return duration(number(value)) if value is not None else ""


def _steps(data: RunData) -> str:
    """`steps` of the summary: a number, or a number per stage; without it, what was logged."""
    told = data.summary.get("steps")
    if isinstance(told, dict):
        return figure(sum(number(value) for value in told.values()))
    if told is not None:
        return figure(number(told))
    return figure(float(len({(row.stage, row.step) for row in data.rows}))) if data.rows else ""


def _strip(data: RunData, accents: Mapping[str, int]) -> list[StageTime]:
    """How the run's time divides among its stages."""
    spent: dict[str, float] = {}
    for event in data.events:
        if event.kind == "stage_end":
            spent[event.stage] = spent.get(event.stage, 0.0) + max(0.0, number(event.fields.get("elapsed_s")))
    total = sum(spent.values())
    if not total > 0:
        return []
    return [
        StageTime(stage=stage, accent=accents[stage], wall=duration(seconds), share=seconds / total)
        for stage, seconds in spent.items()
    ]


def _mark(one: Accuracy) -> Markup | None:
    if math.isnan(one.sampled):
        return None
    half = 0.0 if math.isnan(one.half) else one.half
    low, high = max(0.0, one.sampled - half), min(1.0, one.sampled + half)
    return interval_mark(f"a-{one.stage}", one.sampled, low, high, one.greedy)


def _account_bar(account: Account | None) -> Markup | None:
    if account is None or not account.total.issued:
        return None
    total = account.total
    slices = [
        Slice(label="trained", value=total.trained, kind="g-trained"),
        Slice(label="dropped", value=sum(total.dropped.values()), kind="g-dropped"),
        Slice(label="in flight", value=total.in_flight, kind="g-open"),
    ]
    kept = [piece for piece in slices if piece.value]
    return stacked_bar("g-all", "What became of the prompt groups", kept, "groups")


def _samples(summary: Mapping[str, Json]) -> list[tuple[str, str]]:
    told = summary.get("samples")
    if not isinstance(told, dict):
        return []
    order = ("issued", "trained", "dropped", "failed", "timed_out")
    names = [*(name for name in order if name in told), *(name for name in told if name not in order)]
    return [(name.replace("_", " "), figure(number(told[name]))) for name in names]


def _failure_events(events: Sequence[EventRow]) -> list[EventRow]:
    return [event for event in events if event.kind in _WORDS]


def _failures(events: Sequence[EventRow]) -> list[dict[str, str]]:
    """The failures as table rows, newest last; further fields are joined into one cell."""
    begun = events[0].time if events else 0.0
    rows = []
    for event in _failure_events(events)[-FAILURES_SHOWN:]:
        fields = {key: value for key, value in event.fields.items() if key != "stage"}
        message = fields.pop("message", fields.pop("reason", ""))
        role, phase = fields.pop("role", ""), fields.pop("phase", "")
        rows.append(
            {
                "at": duration(event.time - begun),
                "stage": event.stage or "–",
                "what": str(role or _WORDS[event.kind]),
                "phase": str(phase),
                "message": str(message),
                "rest": ", ".join(f"{key} {value}" for key, value in fields.items()),
            }
        )
    return rows


def _three(value: float) -> str:
    """A share with three decimals, so that a column of them lines up."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def _reward(answer: Answer) -> str:
    """The reward, or why there is none."""
    return answer.status.replace("_", " ") if math.isnan(answer.reward) else f"reward {figure(answer.reward)}"
