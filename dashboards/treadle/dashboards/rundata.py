"""Reads a run folder for the report. A piece that is missing or damaged becomes a note, never a crash."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from treadle.platform.errors import TreadleError
from treadle.platform.ledger import Ledger
from treadle.platform.ledger_audit import LedgerAudit
from treadle.platform.records import Json
from treadle.platform.tracking import EventRow, MetricRow, Redactor, flatten
from treadle.platform.tracking.rollouts import ROLLOUTS_FOLDER, KeptRollout, read_rollouts
from treadle.platform.tracking.spool import (
    EVENTS_FILE,
    METRICS_FILE,
    current_rows,
    event_rows,
    metric_rows,
    read_lines,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """A stage's evaluation on held-out prompts. `half` is half the width of `sampled`'s 95 % interval."""

    stage: str
    sampled: float
    greedy: float
    n: int
    half: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A setting that differs from its default, as text."""

    key: str
    default: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one stage answered to a prompt; `reward` is NaN where nothing was scored."""

    stage: str
    text: str
    reward: float
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """One held-out prompt with the answers of the stages, in the order they were trained."""

    prompt: str
    expected: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What became of the prompt groups, by the ledger: of the whole run, and of each stage that drew any."""

    total: LedgerAudit
    stages: Mapping[str, LedgerAudit]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """Everything the report shows. `notes` say what could not be read."""

    folder: Path
    summary: Mapping[str, Json]
    state: Mapping[str, Json]
    stages: Sequence[str]  # in the order they ran
    rows: Sequence[MetricRow]
    events: Sequence[EventRow]
    settings: Mapping[str, str]
    changes: Sequence[Change] | None
    chains: Sequence[Chain] | None
    account: Account | None
    rollouts: Sequence[KeptRollout]
    notes: Sequence[str]


class Reader:
    """Reads the parts of one run folder and collects what went wrong."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._redactor = Redactor()
        self._notes: list[str] = []

    def read(self) -> RunData:
        summary = self._object("summary.json")
        rows = current_rows(metric_rows(self._lines(METRICS_FILE)))
        events = event_rows(self._lines(EVENTS_FILE))
        begun = [event.stage for event in events if event.kind == "stage_start"]
        stages = list(dict.fromkeys([*begun, *(row.stage for row in rows)]))
        return RunData(
            folder=self._folder,
            summary=summary,
            state=self._object("run.json"),
            stages=stages,
            rows=rows,
            events=events,
            settings=self._settings(),
            changes=self._changes(summary),
            chains=self._chains(),
            account=self._account(stages),
            rollouts=self._rollouts(),
            notes=self._notes,
        )

    def _note(self, name: str, error: object) -> None:
        self._notes.append(self._redactor.message(f"{name} could not be read: {error}"))

    def _json(self, name: str) -> Json:
        path = self._folder / name
        if not path.exists():
            return None
        try:
            value: Json = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            self._note(name, error)
            return None
        return self._redactor.value(value)

    def _object(self, name: str) -> Mapping[str, Json]:
        value = self._json(name)
        return value if isinstance(value, dict) else {}

    def _lines(self, name: str) -> tuple[dict[str, Json], ...]:
        try:
            lines = read_lines(self._folder / name)
        except OSError as error:
            self._note(name, error)
            return ()
        if lines.damaged:
            self._notes.append(f"{name}: {lines.damaged} damaged lines left out")
        return lines.records

    def _settings(self) -> Mapping[str, str]:
        path = self._folder / "config.yaml"
        if not path.exists():
            return {}
        try:
            value = yaml.safe_load(path.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            self._note(path.name, error)
            return {}
        clean = self._redactor.value(value)
        return flatten(clean) if isinstance(clean, dict) else {}

    def _changes(self, summary: Mapping[str, Json]) -> list[Change] | None:
        value = self._json("config_diff.json") or summary.get("config_diff")
        if not isinstance(value, list):
            return None
        triples = [item for item in value if isinstance(item, list) and len(item) == 3]
        changes = []
        for key, default, new in triples:
            shown = self._redactor.value({str(key): new, "": default})
            assert isinstance(shown, dict)
            changes.append(Change(key=str(key), default=_text(default), value=_text(shown[str(key)])))
        return changes

    def _chains(self) -> list[Chain] | None:
        value = self._json("chains.json")
        if not isinstance(value, list):
            return None
        return [_chain(entry) for entry in value if isinstance(entry, dict)]

    def _rollouts(self) -> list[KeptRollout]:
        """The rollouts of the newest file of every stage."""
        newest: dict[str, Path] = {}
        for path in sorted((self._folder / ROLLOUTS_FOLDER).glob("*.parquet")):
            newest[path.stem.rpartition("-")[0]] = path
        kept: list[KeptRollout] = []
        for path in newest.values():
            try:
                kept += read_rollouts(path)
            except (OSError, ValueError, TypeError, KeyError) as error:
                self._note(path.name, error)
        return kept

    def _account(self, stages: Sequence[str]) -> Account | None:
        path = self._folder / "ledger.sqlite"
        if not path.exists():
            return None
        try:
            return read_account(path, stages)
        except (TreadleError, sqlite3.Error) as error:
            self._note(path.name, error)
            return None


def read_account(path: Path, stages: Sequence[str]) -> Account:
    """The ledger's own audit, opened read-only: a report never disturbs a running driver. Raises
    `LedgerError` or `StorageError` for a file that cannot be read."""
    ledger = Ledger.open(path, read_only=True)
    try:
        audits = {stage: ledger.audit(stage) for stage in stages}
        return Account(
            total=ledger.audit(),
            stages={stage: audit for stage, audit in audits.items() if audit.issued or audit.returned},
        )
    finally:
        ledger.close()


def accuracies(summary: Mapping[str, Json]) -> list[Accuracy]:
    """The evaluations of `summary.json`, in its order. `ci95` is a half-width, or a pair of bounds."""
    found = summary.get("eval")
    if not isinstance(found, dict):
        return []
    return [_accuracy(stage, value) for stage, value in found.items() if isinstance(value, dict)]


def _accuracy(stage: str, value: Mapping[str, Json]) -> Accuracy:
    ci95 = value.get("ci95")
    half = (
        (number(ci95[1]) - number(ci95[0])) / 2 if isinstance(ci95, list) and len(ci95) == 2 else number(ci95)
    )
    n = number(value.get("n"))
    return Accuracy(
        stage=stage,
        sampled=number(value.get("sampled")),
        greedy=number(value.get("greedy")),
        n=0 if math.isnan(n) else int(n),
        half=half,
    )


def number(value: Json) -> float:
    """The value as a number, NaN where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan


def _chain(entry: Mapping[str, Json]) -> Chain:
    stages = entry.get("stages")
    answers = [
        Answer(
            stage=str(stage),
            text=str(answer.get("text", "")),
            reward=number(answer.get("reward")),
            status=str(answer.get("status", "scored")),
        )
        for stage, answer in (stages.items() if isinstance(stages, dict) else ())
        if isinstance(answer, dict)
    ]
    return Chain(
        prompt=str(entry.get("prompt", "")), expected=_text(entry.get("answer")), answers=tuple(answers)
    )


def _text(value: Json) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
