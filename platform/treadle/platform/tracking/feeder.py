"""The feeding process: `python -m treadle.platform.tracking.feeder RUN_FOLDER`, started by `Feed`.

consumes: complete lines of the run's spool, from the offsets in `mlflow.json` on;
waits for: new lines, and MLflow to answer (retried with backoff);
unblocked by: new lines, or its standard input: a line `{"drain_s": …}` or, when the driver died, its end;
produces: MLflow runs, metrics and traces, each exactly once.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

from treadle.platform.tracking.feed import MARGIN_S
from treadle.platform.tracking.redact import Redactor

POLL_S = 1.0
ORPHAN_DRAIN_S = 10.0
"""How long the feeder goes on sending when its driver died without a word."""
LAST_TRIES = 3
"""Once the driver wants to end, so many failures in a row say that waiting longer is in vain."""
MAX_BACKOFF_S = 30.0
LOCK_FILE = "logs/mlflow_feeder.lock"

_log = logging.getLogger("treadle.feeder")


class Sink(Protocol):
    """What the loop drives; `MlflowSink` is the real one."""

    def pump(self) -> bool:
        """Sends the next batch. Returns whether there was one; raises while the server is away."""
        ...

    def note(self, error: str, away_s: float) -> None:
        """Writes down that the server is away (`error`), or that it is back after `away_s` seconds (no error)."""
        ...

    def abandon(self) -> None:
        """The driver died: open runs are marked as killed."""
        ...


class Orders:
    """What the driver says through the pipe, and when the feeder must be gone."""

    def __init__(self) -> None:
        self.ending = threading.Event()
        self.orphaned = False
        self._deadline_s = float("inf")
        self._parent = os.getppid()

    @property
    def left_s(self) -> float:
        return self._deadline_s - time.monotonic()

    def follow(self) -> None:
        """Reads the pipe to its end; runs in a thread."""
        for line in sys.stdin:
            self.end(float(json.loads(line)["drain_s"]))
        self._orphan()

    def watch(self) -> None:
        """Ends the process when its time is up, even inside a call that hangs; runs in a thread. The parent's
        id is watched too, because a forked child of the driver may hold the pipe open."""
        while self.left_s > -MARGIN_S / 2:
            if os.getppid() != self._parent:
                self._orphan()
            time.sleep(0.25)
        _log.error("ended by its deadline; the rest stays in the spool")
        logging.shutdown()
        os._exit(3)

    def end(self, drain_s: float) -> None:
        if not self.ending.is_set():
            self._deadline_s = time.monotonic() + drain_s
            self.ending.set()

    def _orphan(self) -> None:
        if not self.ending.is_set():
            self.orphaned = True
            self.end(ORPHAN_DRAIN_S)


def feed(sink: Sink, orders: Orders, redactor: Redactor) -> None:
    """Sends until told to end and everything is sent, or MLflow stays away, or the drain time is up."""
    failures, tried_s = 0, 0.0
    while orders.left_s > 0:
        try:
            if not failures:
                tried_s = time.monotonic()  # what hangs and then fails was away all that time
            progressed = sink.pump()
            if failures:
                sink.note("", time.monotonic() - tried_s)
            failures = 0
        except Exception as error:  # noqa: BLE001  MLflow, its HTTP and its database raise their own trees
            failures += 1
            said = redactor.message(f"{type(error).__name__}: {error}")
            if failures == 1:
                _log.warning("MLflow does not take the spool, trying again: %s", said)
            sink.note(said, 0.0)
            if orders.ending.is_set() and failures >= LAST_TRIES:
                return
            _pause(orders, min(MAX_BACKOFF_S, 0.5 * 2**failures) * random.uniform(0.5, 1.0))
            continue
        if progressed:
            continue
        if orders.ending.is_set():
            if orders.orphaned:
                sink.abandon()
            return
        orders.ending.wait(POLL_S)


def _pause(orders: Orders, seconds: float) -> None:
    """Backs off. Near the end a full backoff would waste the drain time: tries then come every second."""
    if orders.ending.is_set():
        time.sleep(max(0.0, min(seconds, POLL_S, orders.left_s)))
    else:
        orders.ending.wait(seconds)


class _RedactingFormatter(logging.Formatter):
    """MLflow's own log lines and tracebacks may name a URI with a password."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")
        self._redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        return self._redactor.message(super().format(record))


def _prepare(redactor: Redactor) -> None:
    os.nice(19 - os.nice(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_RedactingFormatter(redactor))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


def _hold_lock(run_dir: Path, orders: Orders) -> int:
    """One feeder per run: after a kill, the old one may still be draining when the resumed run starts its
    own. Returns the descriptor that holds the lock, or -1 if the time was up first."""
    fd = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    while orders.left_s > 0:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            orders.ending.wait(0.2)
            if orders.ending.is_set():
                time.sleep(0.1)
    os.close(fd)
    return -1


def main(run_dir: Path) -> int:
    """Feeds one run until its driver ends. Returns the exit code."""
    hello = json.loads(sys.stdin.readline() or "{}")
    if "uri" not in hello:
        return 2
    redactor = Redactor()
    _prepare(redactor)
    orders = Orders()
    threading.Thread(target=orders.follow, daemon=True).start()
    threading.Thread(target=orders.watch, daemon=True).start()
    if _hold_lock(run_dir, orders) < 0:
        return 3
    from treadle.platform.tracking.mlflow import MlflowSink  # seconds, and only in this process

    feed(MlflowSink(run_dir, hello["uri"], hello["experiment"]), orders, redactor)
    logging.shutdown()
    # MLflow's worker threads may hang on a server that is away; everything of ours is on the disk.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
