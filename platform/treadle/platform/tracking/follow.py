"""A run that another process makes, shown as that process's console would show it, from the spool alone."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from treadle.platform.records import Json
from treadle.platform.tracking.console import Console, Eta, closing_line, opening_line, progress_line
from treadle.platform.tracking.spool import (
    EVENTS_FILE,
    METRICS_FILE,
    EventRow,
    MetricRow,
    event_rows,
    metric_rows,
    read_lines,
)
from treadle.platform.tracking.tracker import (
    FAILURE,
    RUN_END,
    RUN_START,
    SAID,
    STAGE_END,
    STAGE_START,
    failure_line,
)


class Follower:
    """Reads on in a run's spool at every `look` and shows what is new.

    Example: `follower = Follower(folder, sys.stdout); follower.catch_up()`, then `follower.look()` twice a second.
    """

    def __init__(self, run_dir: Path, stream: TextIO) -> None:
        self._run_dir = run_dir
        self._console, self._shown = Console(stream), True
        self._offsets = {EVENTS_FILE: 0, METRICS_FILE: 0}
        self._stage, self._began, self._total = "", 0.0, 0
        self._eta = Eta(0)
        self._line = ""

    def catch_up(self, *, show: bool = True) -> None:
        """Passes over what is there already. Of a stage that is under way `show` shows the newest progress line."""
        self._shown = False
        self.look()
        self._shown = True
        if show and self._line:
            self._console.say(self._line)

    def look(self) -> bool:
        """Shows what has been added since the last look. Returns whether anything was."""
        rows: list[EventRow | MetricRow] = [*event_rows(self._new(EVENTS_FILE))]
        rows += metric_rows(self._new(METRICS_FILE))
        for row in sorted(rows, key=lambda row: row.time):
            if isinstance(row, MetricRow):
                self._step(row)
            else:
                self._event(row)
        return bool(rows)

    def _new(self, name: str) -> tuple[dict[str, Json], ...]:
        lines = read_lines(self._run_dir / name, self._offsets[name])
        self._offsets[name] = lines.next_offset
        return lines.records

    def _step(self, row: MetricRow) -> None:
        if row.stage != self._stage:
            return  # a figure of the run as a whole
        done = row.step + 1
        self._eta.tick(done, row.time)
        self._line = progress_line(
            row.stage, done, self._total, row.metrics, eta=self._eta, elapsed_s=row.time - self._began
        )
        if self._shown:
            self._console.progress(self._line, step=done, last=done >= self._total)

    def _event(self, row: EventRow) -> None:
        if row.kind == STAGE_START:
            total = row.fields.get("total_steps", 0)
            self._total = int(total) if isinstance(total, int | float) else 0
            self._stage, self._began, self._eta = row.stage, row.time, Eta(self._total)
        elif row.kind == STAGE_END:
            self._leave_stage()
        elif text := self._words(row):
            if row.kind == RUN_START:
                self._leave_stage()  # the attempt before was killed
            if self._shown:
                self._console.say(text)

    def _leave_stage(self) -> None:
        self._stage = self._line = ""
        if self._shown:
            self._console.keep()

    def _words(self, row: EventRow) -> str:
        fields = row.fields
        if row.kind == SAID:
            return str(fields.get("text", ""))
        if row.kind == FAILURE:
            return failure_line(row.stage, fields)
        if row.kind == RUN_START:
            return opening_line(str(fields.get("name", "")), row.attempt, self._run_dir)
        if row.kind == RUN_END:
            elapsed = fields.get("elapsed_s", 0.0)
            seconds = float(elapsed) if isinstance(elapsed, int | float) else 0.0
            return closing_line(str(fields.get("status", "ended")), seconds, self._run_dir)
        return ""
