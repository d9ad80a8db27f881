"""Whether MLflow takes what it is fed: outages are told, a feeder that died is started again. Runs in the driver."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from treadle.platform.records import Json
from treadle.platform.tracking.feed import LOG_FILE, Feed, FeedState, load_state
from treadle.platform.tracking.spool import EVENTS_FILE, METRICS_FILE

AWAY, BACK = "mlflow_away", "mlflow_back"
MAX_FEEDERS = 4
"""Of one attempt of a run: one that keeps dying has a cause that another one would only meet again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """Something to tell: the event's kind and fields, and the sentence for the console."""

    kind: str
    fields: dict[str, Json]
    text: str


class FeedWatch:
    """Looks at the feeder and at what it writes down of itself. `start` starts a feeder.

    `doing` says what `treadle status` shows, nothing while all is well. `outages` and `away_s` count those of this
    attempt that are over.
    """

    def __init__(self, run_dir: Path, start: Callable[[], Feed]) -> None:
        self._run_dir, self._start = run_dir, start
        state = load_state(run_dir)
        self._outages, self._away_s = state.outages, state.away_s
        self.feed = start()
        self.feeders = 1
        self.doing = ""
        self.outages, self.away_s = 0, 0.0
        self._told_s: float | None = None

    def look(self) -> list[News]:
        """What has changed since the last look. Raises `StorageError` for a damaged state file."""
        news = self._revived()
        state = load_state(self._run_dir)
        if state.error and self._told_s is None:
            self._told_s = time.monotonic()
            text = f"MLflow does not take the figures, which wait in {self._run_dir}: {state.error}"
            news.append(News(kind=AWAY, fields={"message": state.error}, text=text))
        if not state.error and state.outages > self._outages:
            seconds = max(0.0, state.away_s - self._away_s)
            self.outages += state.outages - self._outages
            self.away_s += seconds
            self._told_s = None
            text = f"MLflow takes the figures again, after {seconds:.0f} s"
            news.append(News(kind=BACK, fields={"seconds": round(seconds, 3)}, text=text))
        if not state.error:  # a new server starts at 0
            self._outages, self._away_s = state.outages, state.away_s
        self.doing = self._in_words(state)
        return news

    def _in_words(self, state: FeedState) -> str:
        if self._told_s is None:
            return "its feeder is gone" if self.feed.ended else ""
        since_s, waiting_kib = time.monotonic() - self._told_s, self._waiting(state) / 1024
        return f"away for {since_s:.0f} s, {waiting_kib:.0f} KiB wait: {state.error}"

    def _waiting(self, state: FeedState) -> int:
        """Bytes of the spool. Counting lines would cost more the longer MLflow is away."""
        sent = ((EVENTS_FILE, state.events_offset), (METRICS_FILE, state.metrics_offset))
        return sum(max(0, (self._run_dir / name).stat().st_size - offset) for name, offset in sent)

    def _revived(self) -> list[News]:
        if not self.feed.ended or self.feeders >= MAX_FEEDERS:
            return []
        self.feeders += 1
        cause = f"the process that feeds MLflow ended with code {self.feed.code}"
        last = "; it is the last one" if self.feeders == MAX_FEEDERS else ""
        self.feed = self._start()
        text = f"{cause}, another one goes on{last} (see {self._run_dir / LOG_FILE})"
        return [
            News(kind="replaced", fields={"role": "mlflow", "name": "feeder", "message": cause}, text=text)
        ]
