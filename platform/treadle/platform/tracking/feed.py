"""The driver's end of the MLflow feed: starts the feeding process, and at the end lets it drain.

MLflow takes many seconds and 300 MB to import and may hang for minutes when its server does, so the driver
never imports it. The feeder is told to end through its standard input, a pipe: when the driver dies, in
whatever way, the pipe closes, and the feeder ends as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from treadle.platform.errors import StorageError
from treadle.platform.tracking.spool import EVENTS_FILE, METRICS_FILE, read_lines

STATE_FILE = "mlflow.json"
LOG_FILE = "logs/mlflow_feeder.log"
MARGIN_S = 5.0
"""On top of its drain time, what the feeder gets to save its state and end."""

_SAFE_ENVIRONMENT = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",  # the spool is the queue, and a durable one
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the feeder's own backoff retries, and can be interrupted
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "OMP_NUM_THREADS": "1",
}


@dataclass(kw_only=True)
class FeedState:
    """How far MLflow has taken the spool, and under which runs. Kept in `mlflow.json` of the run folder.

    `uri` is without credentials; another URI starts over with new runs, so that a new server gets everything.
    """

    uri: str = ""
    experiment_id: str = ""
    parent_run_id: str = ""
    stage_run_ids: dict[str, str] = field(default_factory=dict)
    events_offset: int = 0
    metrics_offset: int = 0
    attempt: int = 0
    rejected: int = 0  # records MLflow refuses for good; they stay in the spool
    error: str = ""  # the last failure, empty after a success
    outages: int = 0  # how often MLflow began to fail
    away_s: float = 0.0  # how long the outages took that are over


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsent:
    """What MLflow has not taken: lines left in the spool, records it refused, and the last error."""

    lines: int
    rejected: int
    error: str


def load_state(run_dir: Path) -> FeedState:
    """The state of a run folder, a new one if there is none. Raises `StorageError` for a damaged file."""
    path = run_dir / STATE_FILE
    if not path.exists():
        return FeedState()
    try:
        return FeedState(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise StorageError(
            f"{path} is damaged: {error}.", "Delete it: everything is sent again, as new MLflow runs."
        ) from error


def save_state(run_dir: Path, state: FeedState) -> None:
    """Replaces the state atomically and durably."""
    target = run_dir / STATE_FILE
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    with unfinished.open("w") as file:
        json.dump(asdict(state), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, target)


def unsent(run_dir: Path) -> Unsent:
    """Counts what of the spool has not reached MLflow."""
    state = load_state(run_dir)
    waiting = [
        read_lines(run_dir / METRICS_FILE, state.metrics_offset),
        read_lines(run_dir / EVENTS_FILE, state.events_offset),
    ]
    lines = sum(len(part.records) for part in waiting)
    return Unsent(lines=lines, rejected=state.rejected, error=state.error)


class Feed:
    """One feeding process. Starting it takes milliseconds; it imports MLflow on its own time, at nice 19."""

    def __init__(self, run_dir: Path, uri: str, experiment: str) -> None:
        self._run_dir = run_dir
        log = run_dir / LOG_FILE
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "treadle.platform.tracking.feeder", str(run_dir.resolve())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_SAFE_ENVIRONMENT},
                start_new_session=True,  # Ctrl-C is for the driver, which then lets the feeder drain
            )
        # The URI may hold a password, and other users can read command lines.
        self._tell({"uri": uri, "experiment": experiment})

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process is gone. Nothing sends the spool then."""
        return self._process.poll() is not None

    @property
    def code(self) -> int | None:
        """The exit code of a process that has ended; negative for the signal that ended it."""
        return self._process.poll()

    def close(self, timeout_s: float) -> Unsent:
        """Lets the feeder send the rest, for at most `timeout_s` (plus a margin to end), then ends it."""
        self._tell({"drain_s": timeout_s})
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(timeout_s + MARGIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        except KeyboardInterrupt:
            self._process.kill()
            self._process.wait()
            raise
        return unsent(self._run_dir)

    def abandon(self) -> None:
        """Ends the feeder at once: somebody else's feeds MLflow from here on."""
        self._process.kill()
        self._process.wait()

    def _tell(self, message: dict[str, str] | dict[str, float]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a feeder that died early shows in `unsent` and in its log
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()


def sync(run_dir: Path, uri: str, experiment: str, timeout_s: float) -> Unsent:
    """Sends what a finished or killed run left in its spool. Blocks for at most `timeout_s` and a margin.

    Raises `StorageError` if the folder has no spool.
    """
    if not (run_dir / METRICS_FILE).exists():
        raise StorageError(f"{run_dir} holds no {METRICS_FILE}.", "Name the folder of a run.")
    deadline = time.monotonic() + timeout_s
    feed = Feed(run_dir, uri, experiment)
    return feed.close(max(0.0, deadline - time.monotonic()))
