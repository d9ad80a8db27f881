"""The `Tracker`: spool first, then console; MLflow is fed from the spool by another process.

A run has one `RunTracker`; each stage gets a `StageTracker` from it, which is what loops log to. Nothing here
waits for a network, and nothing raises into a step: what goes wrong is said once on the console and counted.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Protocol, TextIO

from treadle.platform.metric_names import with_aliases
from treadle.platform.records import Json
from treadle.platform.tracking.config import TrackingConfig, tracking_uri
from treadle.platform.tracking.console import Console, Eta, closing_line, opening_line, progress_line
from treadle.platform.tracking.feed import Feed, Unsent
from treadle.platform.tracking.outages import FeedWatch
from treadle.platform.tracking.redact import Redactor, flatten
from treadle.platform.tracking.rollouts import RolloutRow, write_rollouts
from treadle.platform.tracking.spool import EVENTS_FILE, METRICS_FILE, SpoolWriter, event_rows, read_lines

RUN_START = "run_start"
RUN_END = "run_end"
STAGE_START = "stage_start"
STAGE_END = "stage_end"
ROLLOUTS = "rollouts"
FAILURE = "failure"
SAID = "said"
"""A line of the console, for those who follow the run from its folder."""
WRITE_DEADLINE_S = 30.0
"""How long a checkpoint or the end of a run waits for sampled rollouts to be on the disk."""
INTERRUPTED_DRAIN_S = 5.0
"""Whoever presses Ctrl-C does not want to wait; the spool keeps what MLflow has not taken."""


class Mirror(Protocol):
    """Takes every figure a second time as it is logged, e.g. for Prometheus. Must neither wait nor raise."""

    def publish(self, stage: str, metrics: Mapping[str, float]) -> None: ...

    def end_stage(self, stage: str) -> None: ...


class RunTracker:
    """Owns the run folder's spool, the console and the MLflow feed of one attempt of a run.

    Example:
        tracker = RunTracker(run_dir, config.tracking, name="r1-demo", settings=resolved)
        stage = tracker.stage("grpo", total_steps=300)
        stage.log(0, {"reward/mean": 0.4})
        stage.close()
        tracker.close()

    `settings` is the resolved configuration; `json_mode` moves the console to standard error. Raises
    `StorageError` when the run folder is not writable, `ConfigError` for settings that cannot work.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        *,
        name: str = "",
        settings: Mapping[str, Json] | None = None,
        json_mode: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        config.check()
        self.run_dir = run_dir
        self.config = config
        self.redactor = Redactor()
        self.unsent: Unsent | None = None
        self._began = time.monotonic()
        self._events = SpoolWriter(run_dir / EVENTS_FILE)
        self._metrics = SpoolWriter(run_dir / METRICS_FILE)
        self.attempt = _next_attempt(run_dir)
        self._console = Console(
            stream or (sys.stderr if json_mode else sys.stdout), every=config.console_every
        )
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._writes: list[Future[None]] = []
        self._lock = threading.Lock()
        self._looking = threading.Lock()  # not the one above: a step waits for that
        self._warned: set[str] = set()
        self._closed = False
        self._mirror: Mirror | None = None
        self._start(name or run_dir.name, settings or {})

    def stage(self, name: str, *, total_steps: int) -> StageTracker:
        """The tracker of one stage; `total_steps` counts from the stage's beginning, also after a resume."""
        self.event(STAGE_START, {"total_steps": total_steps}, stage=name)
        return StageTracker(self, name, total_steps)

    def mirror_to(self, mirror: Mirror | None) -> None:
        """From here on, every figure also goes to the mirror; None ends that."""
        self._mirror = mirror

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Figures of the run as a whole (stage `run`)."""
        self.write_metrics("run", step, metrics)

    def event(self, kind: str, fields: Mapping[str, Json], *, stage: str = "") -> None:
        """Something that happened. A `failure` (fields role, phase, message …) is shown at once and listed in
        the report."""
        clean = self.redactor.value(dict(fields))
        assert isinstance(clean, dict)
        self._events.append(
            {"kind": kind, "stage": stage, "attempt": self.attempt, "time": time.time(), "fields": clean}
        )
        if kind == FAILURE:
            self._console.say(failure_line(stage, clean))
        self._warn_if_held(self._events)

    def write_metrics(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """One line of the spool, with the aliases that are switched on."""
        named = with_aliases({name: float(value) for name, value in metrics.items()}, self.config.aliases)
        self._metrics.append(
            {
                "stage": stage,
                "step": int(step),
                "attempt": self.attempt,
                "time": time.time(),
                "elapsed_s": round(time.monotonic() - self._began, 6),
                "metrics": dict(named),
            }
        )
        self._warn_if_held(self._metrics)
        if self._mirror is not None:
            self._mirror.publish(stage, metrics)

    def end_stage(self, stage: str, status: str, elapsed_s: float) -> None:
        """A stage is over; its progress line stays."""
        self.event(STAGE_END, {"status": status, "elapsed_s": elapsed_s}, stage=stage)
        self._console.keep()
        if self._mirror is not None:
            self._mirror.end_stage(stage)

    def write_rollouts(self, stage: str, step: int, rows: Sequence[RolloutRow]) -> None:
        """Hands the rows to the writing thread; the event that announces the file follows the file."""
        with self._lock:
            if self._closed:
                return
            self._writes = [write for write in self._writes if not write.done()]
            self._writes.append(self._writer.submit(self._keep_rollouts, stage, step, tuple(rows)))

    def settle(self) -> None:
        """Waits, at most 30 s, until the rollouts handed over so far are on the disk; says how many are not."""
        late = wait(self._writes, timeout=WRITE_DEADLINE_S).not_done
        if late:
            self._warn(
                "late rollouts",
                f"sampled rollouts of {len(late)} steps are not on the disk after {WRITE_DEADLINE_S:g} s; a run "
                "resumed from here may lack them",
            )

    def say(self, text: str) -> None:
        """A line on the console, without secrets, and for those who follow the run from elsewhere."""
        self._show(text)
        self.event(SAID, {"text": text})

    def _show(self, text: str) -> None:
        self._console.say(self.redactor.message(text))

    def show(self, line: str, *, step: int, last: bool) -> None:
        self._console.progress(line, step=step, last=last)

    def close(self, status: str = "finished", timeout_s: float | None = None) -> None:
        """Ends the attempt: `status` is `finished`, `failed` or `interrupted`. Waits at most `timeout_s`
        (default `tracking.drain_s`, after an interrupt 5 s) for MLflow; `unsent` says what it did not take.
        The files are complete in any case. A second call does nothing."""
        with self._looking, self._lock:
            if self._closed:
                return
            self._closed = True
        self.settle()
        self._writer.shutdown(wait=False)
        self._console.keep()
        self.event(RUN_END, {"status": status, "elapsed_s": time.monotonic() - self._began})
        self._events.close()
        self._metrics.close()
        if self.mlflow is not None:
            longest_s = INTERRUPTED_DRAIN_S if status == "interrupted" else self.config.drain_s
            self.unsent = self.mlflow.feed.close(
                min(longest_s, self.config.drain_s) if timeout_s is None else timeout_s
            )
        self._summary(status)

    def abandon(self) -> None:
        """Ends without another word in the run folder, which belongs to another process now."""
        with self._looking, self._lock:
            self._closed = True
        self._writer.shutdown(wait=False, cancel_futures=True)
        self._console.keep()
        if self.mlflow is not None:
            self.mlflow.feed.abandon()

    def look_at_mlflow(self) -> None:
        """Tells when MLflow goes away and comes back, and starts a feeder that died again. Reads small files: to be
        called every few seconds, off the step's path. Raises `StorageError` for a damaged state file."""
        with self._looking:
            if self._closed or self.mlflow is None:
                return
            for news in self.mlflow.look():
                self.say(news.text)
                self.event(news.kind, news.fields)

    def _start(self, name: str, settings: Mapping[str, Json]) -> None:
        params = self.redactor.value(dict(settings))
        assert isinstance(params, dict)
        flat = flatten(params)
        self.event(RUN_START, {"name": name, "version": _version(), "params": dict(flat)})
        uri = tracking_uri(self.config, self.run_dir)
        start = partial(Feed, self.run_dir, uri, self.config.experiment)
        self.mlflow = FeedWatch(self.run_dir, start) if uri else None
        self._show(opening_line(name, self.attempt, self.run_dir))

    def _keep_rollouts(self, stage: str, step: int, rows: tuple[RolloutRow, ...]) -> None:
        clean = [_redacted(row, self.redactor) for row in rows]
        try:
            file = write_rollouts(
                self.run_dir, stage=stage, step=step, attempt=self.attempt, time=time.time(), rows=clean
            )
        except OSError as error:
            self._warn("rollouts", f"sampled rollouts of step {step} are lost: {error}")
            return
        self.event(ROLLOUTS, {"file": file, "step": step, "rows": len(rows)}, stage=stage)

    def _warn_if_held(self, spool: SpoolWriter) -> None:
        if spool.held:
            self._warn(
                "spool", f"the run folder takes no more lines ({spool.last_error}); holding them in memory"
            )

    def _warn(self, about: str, text: str) -> None:
        """Once per subject, so that a full disk does not flood the console."""
        if about not in self._warned:
            self._warned.add(about)
            self._console.say(f"warning: {self.redactor.message(text)}")

    def _summary(self, status: str) -> None:
        self._show(closing_line(status, time.monotonic() - self._began, self.run_dir))
        lost = self._metrics.lost + self._events.lost + self._metrics.held + self._events.held
        if lost:
            self._show(
                f"warning: {lost} lines could not be written to the run folder: {self._metrics.last_error}"
            )
        if self.unsent is not None and self.unsent.lines:
            self._show(f"MLflow has not taken {self.unsent.lines} lines yet; they wait in {self.run_dir}.")
        if self.unsent is not None and self.unsent.error:
            self._show(f"MLflow: {self.unsent.error}")


class StageTracker:
    """The `Tracker` of one stage: its steps go to the spool and to the progress line."""

    def __init__(self, run: RunTracker, stage: str, total_steps: int) -> None:
        self._run = run
        self._stage = stage
        self._total = total_steps
        self._began = time.monotonic()
        self._eta = Eta(total_steps)
        self._closed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Figures of a finished step, counted from 0: step 0 shows as 1/total."""
        self._run.write_metrics(self._stage, step, metrics)
        now = time.monotonic()
        done = step + 1
        self._eta.tick(done, now)
        line = progress_line(
            self._stage, done, self._total, metrics, eta=self._eta, elapsed_s=now - self._began
        )
        self._run.show(line, step=done, last=done >= self._total)

    def event(self, kind: str, fields: Mapping[str, Json]) -> None:
        self._run.event(kind, fields, stage=self._stage)

    def wants_rollouts(self, step: int) -> bool:
        """Whether samples of this step are to be kept, so that nobody fetches texts in vain."""
        config = self._run.config
        return (
            config.rollouts_every > 0 and config.rollouts_per_step > 0 and step % config.rollouts_every == 0
        )

    @property
    def rollouts_per_step(self) -> int:
        """How many samples of a kept step are kept."""
        return self._run.config.rollouts_per_step

    def rollouts(self, step: int, rows: Sequence[RolloutRow]) -> None:
        """Keeps the first `tracking.rollouts_per_step` of the rows, if the step is one of those kept."""
        if rows and self.wants_rollouts(step):
            self._run.write_rollouts(self._stage, step, rows[: self.rollouts_per_step])

    def settle(self) -> None:
        """See `RunTracker.settle`."""
        self._run.settle()

    def close(self, status: str = "finished") -> None:
        """Ends the stage; its progress line stays. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._run.end_stage(self._stage, status, time.monotonic() - self._began)


def _next_attempt(run_dir: Path) -> int:
    starts = [e.attempt for e in event_rows(read_lines(run_dir / EVENTS_FILE).records) if e.kind == RUN_START]
    return max(starts, default=0) + 1


def _version() -> str:
    try:
        return metadata.version("treadle")
    except metadata.PackageNotFoundError:
        return "unknown"


def failure_line(stage: str, fields: Mapping[str, Json]) -> str:
    """A failure as the console shows it."""
    return f"failure in {stage or 'the run'}: {_one_line(fields)}"


def _one_line(fields: Mapping[str, Json]) -> str:
    text = ", ".join(f"{key}={value}" for key, value in fields.items())
    return text if len(text) <= 300 else text[:299] + "…"


def _redacted(row: RolloutRow, redactor: Redactor) -> RolloutRow:
    return replace(
        row,
        prompt=redactor.text(row.prompt),
        completion=redactor.text(row.completion),
        thinking=redactor.text(row.thinking),
        answer=redactor.text(row.answer),
        detail=redactor.message(row.detail),
    )
