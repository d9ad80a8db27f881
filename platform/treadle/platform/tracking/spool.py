"""The spool: append-only files of JSON lines in the run folder, from which everything else is fed.

`metrics.jsonl`, one line per log call:
    {"stage": "grpo", "step": 12, "attempt": 1, "time": 1767225600.1, "elapsed_s": 31.5,
     "metrics": {"reward/mean": 0.5}}
`events.jsonl`:
    {"kind": "failure", "stage": "grpo", "attempt": 1, "time": 1767225600.1, "fields": {"role": "verify"}}
`time` is seconds since 1970, `elapsed_s` monotonic seconds since this attempt began, `attempt` counts the
starts of the run from 1. Figures that are not finite are the texts "nan", "inf", "-inf".
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from treadle.platform.errors import StorageError
from treadle.platform.records import Json

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
MAX_HELD_LINES = 10_000
"""Lines kept in memory while the disk refuses them; older ones are lost and counted beyond that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One log call. Example: see the module's docstring."""

    stage: str
    step: int
    attempt: int
    time: float
    elapsed_s: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """Something that happened; `stage` is empty for events of the whole run."""

    kind: str
    stage: str
    attempt: int
    time: float
    fields: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Complete lines from an offset on: the records, where reading goes on, and how many lines between could
    not be parsed. A last line without its end is not there yet: it is neither read nor counted."""

    records: tuple[dict[str, Json], ...]
    next_offset: int
    damaged: int


class SpoolWriter:
    """Appends whole lines to one file. A write that fails (full disk) is held in memory and tried again with
    the next line; it never raises. Opening cuts off a torn last line, which nobody has read.

    Safe to call from several threads. Raises `StorageError` only when it is opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._held: deque[bytes] = deque(maxlen=MAX_HELD_LINES)
        self.lost = 0
        self.last_error = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._end = _cut_torn_line(self._fd)
        except OSError as error:
            raise StorageError(
                f"The run's file {path} cannot be opened: {error}.", "Choose a writable run folder."
            ) from error

    @property
    def held(self) -> int:
        """Lines that the disk has not taken yet."""
        return len(self._held)

    def append(self, record: Mapping[str, Json]) -> None:
        """Adds one line; on return it is in the operating system's hands, or held."""
        line = json.dumps(_finite(record), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        with self._lock:
            if len(self._held) == MAX_HELD_LINES:
                self.lost += 1
            self._held.append(line.encode("utf-8", "backslashreplace") + b"\n")
            self._flush()

    def close(self) -> None:
        """Writes what is held, if the disk takes it now, and forces the file to the disk."""
        with self._lock:
            if self._fd < 0:
                return
            self._flush()
            try:
                os.fsync(self._fd)
            except OSError as error:
                self.last_error = str(error)
            os.close(self._fd)
            self._fd = -1

    def _flush(self) -> None:
        while self._held and self._fd >= 0:
            line = self._held[0]
            try:
                written = os.write(self._fd, line)
                if written < len(line):
                    raise OSError(f"only {written} of {len(line)} bytes fitted")
            except OSError as error:
                self.last_error = str(error)
                self._cut_back()
                return
            self._end += len(line)
            self._held.popleft()

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._fd, self._end)
        except OSError as error:
            self.last_error = str(error)


def _cut_torn_line(fd: int) -> int:
    """Shortens the file to its last complete line; returns the new length."""
    size = os.fstat(fd).st_size
    end = size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(fd, end)
    return end


def _finite(value: Json | Mapping[str, Json]) -> Json:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def read_lines(path: Path, offset: int = 0, limit: int | None = None) -> Lines:
    """The complete lines of a spool file from a byte offset on, at most `limit`. A missing file has none."""
    if not path.exists():
        return Lines(records=(), next_offset=offset, damaged=0)
    records: list[dict[str, Json]] = []
    damaged = 0
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n") or (limit is not None and len(records) + damaged >= limit):
                break
            offset += len(line)
            record = _parse(line)
            if record is None:
                damaged += 1
            else:
                records.append(record)
    return Lines(records=tuple(records), next_offset=offset, damaged=damaged)


def _parse(line: bytes) -> dict[str, Json] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def metric_rows(records: Iterable[Mapping[str, Json]]) -> list[MetricRow]:
    """Typed rows; a record that lacks a field, or has it in another type, is left out."""
    rows = []
    for record in records:
        try:
            rows.append(_metric_row(record))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    return rows


def _metric_row(record: Mapping[str, Json]) -> MetricRow:
    metrics = record["metrics"]
    if not isinstance(metrics, dict):
        raise TypeError("metrics is not a mapping")
    return MetricRow(
        stage=str(record["stage"]),
        step=int(_number(record["step"])),
        attempt=int(_number(record["attempt"])),
        time=_number(record["time"]),
        elapsed_s=_number(record["elapsed_s"]),
        metrics={str(name): _number(value) for name, value in metrics.items()},
    )


def _number(value: Json) -> float:
    """A figure as the spool holds it: a number, or the text of one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def event_rows(records: Iterable[Mapping[str, Json]]) -> list[EventRow]:
    """Typed events; a record that lacks a field is left out."""
    rows = []
    for record in records:
        fields = record.get("fields")
        try:
            rows.append(
                EventRow(
                    kind=str(record["kind"]),
                    stage=str(record["stage"]),
                    attempt=int(_number(record["attempt"])),
                    time=_number(record["time"]),
                    fields=fields if isinstance(fields, dict) else {},
                )
            )
        except (KeyError, TypeError, ValueError):
            continue
    return rows


def current_rows(rows: Iterable[MetricRow]) -> list[MetricRow]:
    """One row per (stage, step), in the order the stages began, steps ascending.

    After a rollback the same steps are logged again: the newest attempt counts. Steps of an older attempt
    beyond the last one of a newer attempt belong to work that was rolled back, and are left out. Several log
    calls of one step in one attempt are joined.
    """
    joined: dict[tuple[str, int], MetricRow] = {}
    last: dict[str, dict[int, int]] = {}  # stage -> attempt -> last step
    for row in rows:
        steps = last.setdefault(row.stage, {})
        steps[row.attempt] = max(row.step, steps.get(row.attempt, row.step))
        known = joined.get((row.stage, row.step))
        if known is None or row.attempt > known.attempt:
            joined[row.stage, row.step] = row
        elif row.attempt == known.attempt:
            joined[row.stage, row.step] = _join(known, row)
    kept = [row for row in joined.values() if row.step <= _reach(last[row.stage], row.attempt)]
    order = {stage: index for index, stage in enumerate(last)}
    return sorted(kept, key=lambda row: (order[row.stage], row.step))


def _reach(last: Mapping[int, int], attempt: int) -> int:
    """The last step that newer attempts left valid of this attempt."""
    return min([step for other, step in last.items() if other >= attempt])


def _join(first: MetricRow, second: MetricRow) -> MetricRow:
    return MetricRow(
        stage=second.stage,
        step=second.step,
        attempt=second.attempt,
        time=second.time,
        elapsed_s=second.elapsed_s,
        metrics={**first.metrics, **second.metrics},
    )


def read_metrics(run_dir: Path) -> list[MetricRow]:
    """The current rows of a run folder."""
    return current_rows(metric_rows(read_lines(run_dir / METRICS_FILE).records))


def read_events(run_dir: Path) -> list[EventRow]:
    """All events of a run folder, in order."""
    return event_rows(read_lines(run_dir / EVENTS_FILE).records)
