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
from treadle.workflows.progress import alive, here, silent_s, stopped
from treadle.workflows.stopping import ask_to_stop

LOOK_S = 0.5
MUTE_S = 300.0
"""A run writes what its roles are doing every few seconds, unless its driver has a large file in hand."""
GRACE_S = 60.0
"""What a run that is to stop takes beyond its deadline: to end its processes, and MLflow's last figures."""


def follow_process(folder: RunFolder, stream: TextIO) -> None:
    """Shows what a run that has no controller writes, to its end, whose error is raised.

    consumes: the folder; waits for: its process to end; unblocked by: `run.json`, the process's death (on this
    machine), or `MUTE_S` without a word; produces: the console's lines.
    """
    follower, attempt = Follower(folder.path, stream), folder.state().get("attempts")
    follower.catch_up()
    try:
        while (state := folder.state()).get("state") == "running" and state.get("attempts") == attempt:
            follower.look()
            if (dead := gone(state)) and folder.state() == state:
                raise RoleError(f"driver: {dead}.", f"Continue with: treadle resume {folder.path}")
            if (quiet_s := silent_s(folder, state)) > MUTE_S:
                raise DeadlineError(
                    f"driver: process {state.get('pid')} on {_host(state)} has written nothing for {quiet_s:.0f} s; "
                    "it is frozen, hangs or is cut off.",
                    f"Continue with: treadle resume {folder.path} --take-over",
                )
            time.sleep(LOOK_S)
    except KeyboardInterrupt:
        raise Interrupted("No longer followed; the run goes on.") from None
    follower.look()
    conclude(folder)


def gone(state: Mapping[str, Any]) -> str:
    """That a run which says it is running is not; empty if it is, or if only another machine could tell."""
    pid = int(state.get("pid", 0))
    return f"its process {pid} is gone without a word" if here(state) and not alive(pid) else ""


def _host(state: Mapping[str, Any]) -> str:
    return str(state.get("host", "")) or socket.gethostname()


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
        if dead := gone(state):
            return f"{folder.path}: {dead}; nothing runs. Continue with: treadle resume {folder.path}"
        frozen = here(state) and stopped(int(state.get("pid", 0)))
        if frozen or time.monotonic() >= until:
            why = "it is frozen" if frozen else f"it has not ended within {deadline_s + GRACE_S:g} s"
            raise DeadlineError(
                f"{folder.path}: process {state.get('pid')} on {_host(state)} does not stop: {why}.",
                "Kill that process; what is committed stays.",
            )
        time.sleep(LOOK_S)
    error = state.get("error") or {}
    said = f"{error.get('message', '')} {error.get('remedy', '')}".strip()
    return f"{folder.path}: {said or state.get('state')}"
