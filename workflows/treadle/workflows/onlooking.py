"""Following and stopping a run from its folder alone, whichever process runs it: no Ray in sight."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from typing import Any, TextIO

from treadle.platform.errors import DeadlineError, Interrupted, RoleError
from treadle.platform.tracking.follow import Follower
from treadle.workflows.folder import RunFolder
from treadle.workflows.outcomes import conclude
from treadle.workflows.progress import SILENT_S, alive, here, silent_s, stopped
from treadle.workflows.stopping import ask_to_stop

LOOK_S = 0.5
GRACE_S = 60.0
"""What a run that is to stop takes beyond its deadline: to end its processes, and MLflow's last figures."""


def follow_process(folder: RunFolder, stream: TextIO) -> None:
    """Shows what a run that has no controller writes, to its end, whose error is raised.

    consumes: the folder; waits for: its process to end; unblocked by: `run.json`, the process's death or, from another
    machine, `SILENT_S` without a word; produces: the console's lines.
    """
    follower, attempt = Follower(folder.path, stream), folder.state().get("attempts")
    follower.catch_up()
    try:
        while (state := folder.state()).get("state") == "running" and state.get("attempts") == attempt:
            follower.look()
            if (gone := lost(folder, state)) and folder.state() == state:
                raise RoleError(f"driver: {gone}.", f"Continue with: treadle resume {folder.path}")
            time.sleep(LOOK_S)
    except KeyboardInterrupt:
        raise Interrupted("No longer followed; the run goes on.") from None
    follower.look()
    conclude(folder)


def lost(folder: RunFolder, state: Mapping[str, Any]) -> str:
    """Why a run that says it is running is not, as far as this machine can tell; empty if it is."""
    pid, host = int(state.get("pid", 0)), str(state.get("host", ""))
    if here(state):
        return "" if alive(pid) else f"its process {pid} is gone without a word"
    quiet_s = silent_s(folder, state)
    return f"process {pid} on {host} has written nothing for {quiet_s:.0f} s" if quiet_s > SILENT_S else ""


def stop_run(folder: RunFolder, deadline_s: float) -> str:
    """Asks a run to commit and end, and waits until it has. Returns how it ended, in words.

    consumes: `run.json`; waits for: the run's end; unblocked by: it, the process's death, or the deadline and
    `GRACE_S`; produces: the stop file. Raises `DeadlineError` for a run that does not react.
    """
    began = folder.state()
    if began.get("state") != "running":
        return f"{folder.path}: {began.get('state', 'never started')}; nothing runs."
    attempt, until = began.get("attempts"), time.monotonic() + deadline_s + GRACE_S
    ask_to_stop(folder, deadline_s)
    while (state := folder.state()).get("state") == "running" and state.get("attempts") == attempt:
        if gone := lost(folder, state):
            return f"{folder.path}: {gone}; nothing runs. Continue with: treadle resume {folder.path}"
        frozen = here(state) and stopped(int(state.get("pid", 0)))
        if frozen or time.monotonic() >= until:
            why = "it is frozen" if frozen else f"it has not ended within {deadline_s + GRACE_S:g} s"
            where = state.get("host") or socket.gethostname()
            raise DeadlineError(
                f"{folder.path}: process {state.get('pid')} on {where} does not stop: {why}.",
                "Kill that process; what is committed stays.",
            )
        time.sleep(LOOK_S)
    error = state.get("error") or {}
    said = f"{error.get('message', '')} {error.get('remedy', '')}".strip()
    return f"{folder.path}: {said or state.get('state')}"
