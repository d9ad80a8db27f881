"""Where a run stands, told from its folder."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import psutil

from treadle.platform.errors import ClusterError
from treadle.platform.ledger import Ledger
from treadle.platform.tracking import read_metrics
from treadle.workflows.folder import RunFolder, read_json
from treadle.workflows.outputs import outputs_of
from treadle.workflows.watch import ROLES_FILE, first_failure, last_seen

SHOWN = ("reward/mean", "accuracy/sampled", "accuracy/heldout_sampled", "response_length/mean", "policy/loss")


FROZEN = "frozen"
"""The state of a run whose driver was stopped by a signal: SIGCONT wakes it, unless another one takes over."""


KILLED = "killed"
SILENT = "silent"
"""The state of a run whose driver, on another machine, writes nothing any more: it is dead, frozen or cut off."""
SILENT_S = 60.0
"""`roles.json` is written every few seconds."""
ASK_AFTER_S = 7.0
"""A controller elsewhere that has written nothing for so long is asked for."""


def describe(folder: RunFolder) -> dict[str, Any]:
    """State, attempts, finished stages, the newest step with its figures, and the samples' fate. A run whose
    process is gone without a word is reported as `killed`, one that another machine's process runs without a word as
    `silent`."""
    state = folder.state()
    word = state.get("state", "never started")
    fate = ""
    if word == "running":
        word, fate = _running(folder, state)
    rows = read_metrics(folder.path)
    newest = max(rows, key=lambda row: row.time, default=None)
    result: dict[str, Any] = {
        "folder": str(folder.path),
        "state": word,
        "attempts": state.get("attempts", 0),
        "controller": state.get("controller") or {},
        "fate": fate,
        "stages_finished": list(outputs_of(folder)),
        "stage": newest.stage if newest else None,
        "step": newest.step if newest else None,
        "seconds_since_last_step": time.time() - newest.time if newest else None,
        "figures": {k: newest.metrics[k] for k in SHOWN if k in newest.metrics} if newest else {},
        "samples": _audit(folder),
        "now": last_seen(folder.path) if word in ("running", FROZEN) else {},
        "first_failure": first_failure(folder.path),
        "mirror": read_json(folder.mirror) if folder.mirror.exists() else {},
    }
    return {**result, "text": _text(result)}


def _running(folder: RunFolder, state: Mapping[str, Any]) -> tuple[str, str]:
    """What a run is that says it is running, and what is known of a controller on another machine that is not."""
    if not here(state):
        quiet_s = silent_s(folder, state)
        word = SILENT if quiet_s > SILENT_S else "running"
        since_s = quiet_s or time.time() - float(state.get("started_unix_s", 0.0))
        if state.get("controller") and since_s > ASK_AFTER_S:
            return _asked_for(folder, word)
        return word, ""
    if not alive(int(state.get("pid", 0))):
        return KILLED, "it is gone without a word"
    return FROZEN if stopped(int(state.get("pid", 0))) else "running", ""


def _asked_for(folder: RunFolder, otherwise: str) -> tuple[str, str]:
    """The head of its cluster knows what became of a controller; where it does not answer, or wants a token, nothing is
    concluded from that."""
    from treadle.workflows.detached import lost

    try:
        cause = lost(folder)
    except ClusterError as error:
        return otherwise, f"whether it lives cannot be found out: {error.message.rstrip('.')}"
    return (KILLED, cause) if cause else (otherwise, "")


def here(state: Mapping[str, Any]) -> bool:
    """Whether the process that runs a run is one of this machine's."""
    return (str(state.get("host", "")) or socket.gethostname()) == socket.gethostname()


def silent_s(folder: RunFolder, state: Mapping[str, Any]) -> float:
    """For how many seconds a run has not said what its roles are doing; 0 until it says so for the first time."""
    try:
        said = (folder.path / ROLES_FILE).stat().st_mtime
    except OSError:
        return 0.0
    return max(0.0, time.time() - said) if said >= float(state.get("started_unix_s", 0.0)) else 0.0


def holder(state: Mapping[str, Any]) -> str:
    """Which process runs a run, by its `run.json`, or nothing if none does: it is gone, or stopped (SIGSTOP), and the
    ledger keeps it from writing once another one has taken over."""
    pid = int(state.get("pid", 0))
    if state.get("state") != "running":
        return ""
    if not here(state):
        return f"process {pid} on {state['host']}"
    if not alive(pid):
        return ""
    return "" if stopped(pid) else f"process {pid}"


def stopped(pid: int) -> bool:
    """Whether a process is frozen by a signal (SIGSTOP)."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def alive(pid: int) -> bool:
    """Whether a process with this id exists."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _audit(folder: RunFolder) -> dict[str, Any]:
    if not folder.ledger.exists():
        return {}
    with Ledger.open(folder.ledger, read_only=True) as ledger:
        audit = ledger.audit()
    return {
        "issued": audit.issued,
        "trained": audit.trained,
        "in_flight": audit.in_flight,
        "dropped": dict(audit.dropped),
        "failed": audit.failed,
        "timed_out": audit.timed_out,
    }


def _text(result: dict[str, Any]) -> str:
    lines = [f"{result['folder']}: {result['state']}, attempt {result['attempts']}"]
    if controller := result["controller"]:
        lines.append(_controller(controller, result["state"], result["fate"]))
    if result["stages_finished"]:
        lines.append(f"finished stages: {', '.join(result['stages_finished'])}")
    if result["stage"] is not None:
        figures = "  ".join(f"{name} {value:.3f}" for name, value in result["figures"].items())
        age = result["seconds_since_last_step"]
        lines.append(f"last step: {result['stage']} {result['step'] + 1}, {age:.0f} s ago  {figures}")
    if now := result["now"]:
        driver, age = now["driver"], time.time() - now["unix_s"]
        lines.append(
            f"{age:.0f} s ago: {driver['stage']} step {driver['step'] + 1}, "
            f"{driver['doing'] or 'between two phases'} for {driver['for_s']:.0f} s"
        )
        lines += [f"  {name:<12} {said}" for name, said in now["roles"].items()]
        lines += _sizes(now)
    if failure := result["first_failure"]:
        lines.append(f"first failure: {failure['error']}: {failure['message']} (all: {failure['file']})")
    if mirror := result["mirror"]:
        lines.append(_mirror(mirror))
    if result["samples"]:
        counts = "  ".join(f"{name} {value}" for name, value in result["samples"].items())
        lines.append(f"groups: {counts}")
    if result["state"] in (KILLED, "interrupted", "failed", FROZEN, SILENT):
        how = " --detach" if result["controller"] else ""
        if result["state"] == SILENT and result["fate"]:  # nobody can say whether it still runs
            how = " --take-over"
        lines.append(f"continue with: treadle resume {result['folder']}{how}")
    return "\n".join(lines)


def _sizes(now: Mapping[str, Any]) -> list[str]:
    """How many of the roles that can grow and shrink work, what was asked for last, and who has less of what fills
    memory."""
    sizes = ", ".join(f"{name}={size}" for name, size in now.get("sizes", {}).items())
    going = f"; being scaled to {now['scaling']}" if now.get("scaling") else ""
    lowered = [f"memory ran out: {name} has {said}" for name, said in now.get("lowered", {}).items()]
    return [f"sizes: {sizes}{going}", *lowered] if sizes else lowered


def _controller(said: Mapping[str, Any], state: str, fate: str) -> str:
    """Where a detached run's controller is or was, and since when."""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(said["since_unix_s"]))
    runs = "runs" if state in ("running", FROZEN, SILENT) else "ran"
    gone = f"; {fate}" if fate else ""
    if state == KILLED:
        gone += ", and what belonged to it ended with it"
    return (
        f"detached: controller {said['name']}, process {said['pid']} on {said['host']}, {runs} it on the cluster at "
        f"{said['address']} since {since}{gone}"
    )


def _mirror(said: Mapping[str, Any]) -> str:
    """The mirror's newest commit, what waits, and what keeps it from arriving."""
    now = time.time()
    held = (
        f"{said['stage']}, step {said['step']}, {now - said['mirrored_unix_s']:.0f} s ago"
        if said["stage"]
        else "nothing yet"
    )
    line = f"mirror {said['url']}: {held}"
    if said["behind_since"]:
        line += f"; {said['lag_steps']} steps behind for {now - said['behind_since']:.0f} s"
    if said["skipped"]:
        line += f"; {said['skipped']} commits skipped"
    if said["error"]:
        line += f"; failing for {now - said['failing_since']:.0f} s: {said['error']}"
    return line
