"""Feeds MLflow from the spool. Imported only by the feeding process.

One parent run per run folder, one nested run per stage, both found again by their ids in `mlflow.json`.
Sending twice changes nothing: metric points carry the spool's time stamps and are unique by them, traces have
ids derived from what they show, and runs are searched by the run's own id before they are created.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException, RestException
from mlflow.tracing.client import TracingClient
from mlflow.tracking import MlflowClient

from treadle.platform.records import Json
from treadle.platform.tracking import tracker
from treadle.platform.tracking.feed import FeedState, load_state, save_state
from treadle.platform.tracking.mlflow_traces import send_traces
from treadle.platform.tracking.redact import Redactor
from treadle.platform.tracking.rollouts import read_rollouts
from treadle.platform.tracking.spool import (
    EVENTS_FILE,
    METRICS_FILE,
    EventRow,
    MetricRow,
    event_rows,
    metric_rows,
    read_lines,
)

EVENTS_PER_BATCH = 1
"""An event may bring dozens of traces: one failure must not throw away what many before it have sent."""
LINES_PER_BATCH = 400
METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
MAX_PARAM_CHARS = 6000
MAX_KEY_CHARS = 250
REFUSED_FOR_GOOD = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST")
"""Error codes that trying again cannot change; everything else counts as the server being away. A bad request counts
only where MLflow itself says so: gateways before it answer with that, too."""

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_UID_TAG = "treadle.uid"
_STAGE_TAG = "treadle.stage"

T = TypeVar("T")
_log = logging.getLogger("treadle.feeder")


def allowed_key(name: str) -> str:
    """The name with the characters MLflow refuses replaced, and cut to its limit."""
    return re.sub(r"[^\w./ :-]", "_", name)[:MAX_KEY_CHARS]


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


class MlflowSink:
    """Sends the spool of one run, in order, and remembers how far it came.

    `pump` raises whatever MLflow raises while the server is away; nothing is skipped then.
    """

    def __init__(self, run_dir: Path, uri: str, experiment: str) -> None:
        self._run_dir = run_dir
        self._uri = uri
        self._experiment = experiment
        self._state = load_state(run_dir)
        shown = Redactor().text(uri)
        if self._state.uri != shown:
            self._state = FeedState(uri=shown)
            save_state(run_dir, self._state)
        self._client: MlflowClient | None = None
        self._start = _run_starts(run_dir)

    def pump(self) -> bool:
        """Sends the next events and metrics. Returns whether there were any."""
        client = self._connect()
        sent_events = self._pump_events(client)
        sent_metrics = self._pump_metrics(client)
        if sent_events or sent_metrics:
            save_state(self._run_dir, self._state)
        return sent_events or sent_metrics

    def note(self, error: str, away_s: float) -> None:
        """See `feeder.Sink`."""
        if error and not self._state.error:
            self._state.outages += 1
        self._state.error = error[:500]
        self._state.away_s += away_s
        save_state(self._run_dir, self._state)

    def abandon(self) -> None:
        """Marks the run, and stages without an end, as killed."""
        client = self._connect()
        for run_id in (*self._state.stage_run_ids.values(), self._state.parent_run_id):
            if run_id and client.get_run(run_id).info.status == "RUNNING":
                client.set_terminated(run_id, "KILLED")

    def _connect(self) -> MlflowClient:
        if self._client is None:
            client = MlflowClient(tracking_uri=self._uri)
            if not self._state.experiment_id:
                self._state.experiment_id = self._find_experiment(client)
                save_state(self._run_dir, self._state)
            self._client = client
        return self._client

    def _find_experiment(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self._experiment)
        if found is not None:
            return found.experiment_id
        own = self._uri == f"sqlite:///{self._run_dir / 'mlflow.db'}"
        artifacts = (self._run_dir / "mlartifacts").as_uri() if own else None
        return client.create_experiment(self._experiment, artifact_location=artifacts)

    def _pump_events(self, client: MlflowClient) -> bool:
        lines = read_lines(self._run_dir / EVENTS_FILE, self._state.events_offset, EVENTS_PER_BATCH)
        for event in event_rows(lines.records):
            self._tolerate(1, partial(self._send_event, client, event))
        moved = lines.next_offset > self._state.events_offset
        self._state.events_offset = lines.next_offset
        return moved

    def _pump_metrics(self, client: MlflowClient) -> bool:
        lines = read_lines(self._run_dir / METRICS_FILE, self._state.metrics_offset, LINES_PER_BATCH)
        by_stage: dict[str, list[MetricRow]] = {}
        for row in metric_rows(lines.records):
            by_stage.setdefault(row.stage, []).append(row)
        for stage, rows in by_stage.items():
            self._send_metrics(client, self._stage_run(client, stage), rows)
        moved = lines.next_offset > self._state.metrics_offset
        self._state.metrics_offset = lines.next_offset
        return moved

    def _send_metrics(self, client: MlflowClient, run_id: str, rows: Sequence[MetricRow]) -> None:
        points = [point for row in rows for point in _points(row)]
        for batch in _chunks(points, METRICS_PER_REQUEST):
            self._tolerate(len(batch), partial(client.log_batch, run_id, batch, synchronous=True))

    def _tolerate(self, records: int, send: Callable[[], object]) -> None:
        """Counts records that MLflow refuses for good, whatever is tried; any other failure is raised, and
        tried again."""
        try:
            send()
        except MlflowException as error:
            unsaid = error.error_code == "BAD_REQUEST" and not isinstance(error, RestException)
            if error.error_code not in REFUSED_FOR_GOOD or unsaid:
                raise
            _log.error("MLflow refuses %d records for good: %s", records, error)
            self._state.rejected += records

    def _send_event(self, client: MlflowClient, event: EventRow) -> None:
        if event.kind == tracker.RUN_START:
            self._begin_attempt(client, event)
        elif event.kind == tracker.STAGE_START:
            self._mark(client, self._stage_run(client, event.stage), "RUNNING")
        elif event.kind == tracker.STAGE_END:
            self._end(client, self._stage_run(client, event.stage), event)
        elif event.kind == tracker.RUN_END:
            self._end(client, self._parent_run(client), event)
        elif event.kind == tracker.ROLLOUTS:
            self._send_rollouts(client, event)

    def _send_rollouts(self, client: MlflowClient, event: EventRow) -> None:
        path = self._run_dir / str(event.fields["file"])
        try:
            kept = read_rollouts(path)
        except (OSError, ValueError, KeyError, TypeError) as error:  # tidied up by somebody, or damaged
            _log.error("%s is left out: %s", path.name, error)
            self._state.rejected += 1
            return
        run_id = self._stage_run(client, event.stage)
        send_traces(TracingClient(self._uri), self._state.experiment_id, run_id, kept)

    def _begin_attempt(self, client: MlflowClient, event: EventRow) -> None:
        self._start = event
        parent = self._parent_run(client)
        if event.attempt > 1:
            self._mark(client, parent, "RUNNING")
            self._log_params(client, parent)
        client.set_tag(parent, "treadle.attempt", str(event.attempt))
        self._state.attempt = event.attempt

    def _mark(self, client: MlflowClient, run_id: str, status: str) -> None:
        if client.get_run(run_id).info.status != status:
            client.update_run(run_id, status=status)

    def _end(self, client: MlflowClient, run_id: str, event: EventRow) -> None:
        status = _STATUS.get(str(event.fields.get("status")), "FAILED")
        client.set_terminated(run_id, status, int(event.time * 1000))

    def _parent_run(self, client: MlflowClient) -> str:
        if not self._state.parent_run_id:
            name = self._start.fields.get("name") if self._start else None
            self._state.parent_run_id = self._find_or_create(client, "", str(name or self._run_dir.name))
            save_state(self._run_dir, self._state)
        return self._state.parent_run_id

    def _stage_run(self, client: MlflowClient, stage: str) -> str:
        if stage not in self._state.stage_run_ids:
            self._parent_run(client)
            self._state.stage_run_ids[stage] = self._find_or_create(client, stage, stage)
            save_state(self._run_dir, self._state)
        return self._state.stage_run_ids[stage]

    def _find_or_create(self, client: MlflowClient, stage: str, name: str) -> str:
        """The run of this stage (empty: the parent). It may exist although the state does not know it, when
        the feeder was killed right after creating it."""
        uid = self._uid()
        known = client.search_runs(
            [self._state.experiment_id],
            f"tags.`{_UID_TAG}` = '{uid}' and tags.`{_STAGE_TAG}` = '{stage or 'run'}'",
            max_results=1,
        )
        if known:
            run_id = str(known[0].info.run_id)
        else:
            tags = self._tags(uid, stage)
            run_id = client.create_run(self._state.experiment_id, tags=tags, run_name=name).info.run_id
        self._log_params(client, run_id)
        return run_id

    def _uid(self) -> str:
        began = self._start_of_run()
        return hashlib.blake2b(f"{self._run_dir.name}|{began}".encode(), digest_size=16).hexdigest()

    def _start_of_run(self) -> float:
        """When the first attempt began: with the folder's name, what tells this run from all others."""
        first = event_rows(read_lines(self._run_dir / EVENTS_FILE, limit=1).records)
        return first[0].time if first else 0.0

    def _tags(self, uid: str, stage: str) -> dict[str, str]:
        version = str(self._start.fields.get("version", "")) if self._start else ""
        tags = {_UID_TAG: uid, _STAGE_TAG: stage or "run", "treadle.version": version}
        tags["treadle.attempt"] = str(self._start.attempt if self._start else 1)
        if stage:
            tags["mlflow.parentRunId"] = self._state.parent_run_id
        return tags

    def _log_params(self, client: MlflowClient, run_id: str) -> None:
        """Parameters are immutable in MLflow: a setting that a later attempt changed becomes a tag."""
        if self._start is None:
            return
        wanted = _params(self._start.fields.get("params"))
        known = client.get_run(run_id).data.params
        fresh = [Param(key, value) for key, value in wanted.items() if key not in known]
        for batch in _chunks(fresh, PARAMS_PER_REQUEST):
            client.log_batch(run_id, params=batch, synchronous=True)
        changed = [
            RunTag(f"attempt{self._start.attempt}.{key}"[:MAX_KEY_CHARS], value)
            for key, value in wanted.items()
            if known.get(key, value) != value
        ]
        for tags in _chunks(changed, PARAMS_PER_REQUEST):
            client.log_batch(run_id, tags=tags, synchronous=True)


def _points(row: MetricRow) -> Iterable[Metric]:
    stamp_ms = int(row.time * 1000)
    return [Metric(allowed_key(name), value, stamp_ms, row.step) for name, value in row.metrics.items()]


def _params(params: Json) -> Mapping[str, str]:
    if not isinstance(params, dict):
        return {}
    return {allowed_key(key): _short(str(value)) for key, value in params.items()}


def _short(value: str) -> str:
    return value if len(value) <= MAX_PARAM_CHARS else value[: MAX_PARAM_CHARS - 1] + "…"


def _run_starts(run_dir: Path) -> EventRow | None:
    """The newest start of the run."""
    starts = [e for e in event_rows(read_lines(run_dir / EVENTS_FILE).records) if e.kind == tracker.RUN_START]
    return starts[-1] if starts else None
