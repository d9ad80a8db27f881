"""Why an actor is gone, in one clause, out of what Ray says about it in a page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ray._private.state import GlobalState, actors
from ray._raylet import GcsClientOptions  # type: ignore[attr-defined]
from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnavailableError,
    ActorUnschedulableError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RuntimeEnvSetupError,
)

from treadle.platform.memory import NODE_RAN_OUT

GONE = (
    RayActorError,
    ActorUnschedulableError,
    OutOfMemoryError,
    RuntimeEnvSetupError,
    ActorPlacementGroupRemoved,
)
"""What Ray raises for a call of an actor that is gone, or never came: they have no class in common but `RayError`."""

_OUT_OF_MEMORY = f"{NODE_RAN_OUT}, and Ray ended its process"
_PID = re.compile(r"\bpid: (\d+)")
_EXIT = re.compile(r"Worker exit type: (\w+)")
_OF_THE_NODE = ("node has died", "node was dead", "node is dead")


def why(error: RayError) -> str:
    """What happened to the actor's process, e.g. "its process 4711 was killed or crashed"."""
    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemoryError):
        return _OUT_OF_MEMORY
    if isinstance(error, ActorUnschedulableError):
        return f"it cannot be placed: {text[:200]}"
    if isinstance(error, ActorUnavailableError):
        return "it cannot be reached at the moment"
    return _clause(text)


def death_of(actor_id: str) -> str:
    """What ended an actor that is gone, as far as the cluster's head remembers; empty if it does not. Ray has no public
    function for it that does without the dashboard."""
    try:
        return _cause(actors(actor_id))
    except (RayError, RuntimeError, ValueError):
        return ""


def death_at(address: str, actor_id: str) -> str:
    """The same, asked of the head at an address by a process that has no Ray, and need not be on one of its nodes. The
    head must be known to answer."""
    head = GlobalState()
    head._initialize_global_state(
        GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    try:
        return _cause(head.actor_table(actor_id))
    except (RayError, RuntimeError, ValueError):
        return ""
    finally:
        head.disconnect()


def _cause(known: Mapping[str, Any]) -> str:
    if known.get("State") != "DEAD":
        return ""
    told = known["DeathCause"].actor_died_error_context
    return _clause(f"{' '.join(told.error_message.split())} pid: {told.pid}")


def _clause(text: str) -> str:
    pid, exited = _PID.search(text), _EXIT.search(text)
    kind = exited[1] if exited else ""
    if kind == "NODE_OUT_OF_MEMORY":
        return _OUT_OF_MEMORY
    if any(words in text for words in _OF_THE_NODE):
        return "its node died"
    process = f"its process {pid[1]}" if pid else "its process"
    if kind == "SYSTEM_ERROR":
        return f"{process} was killed or crashed"
    return f"{process} ended ({kind})" if kind else text.split(". ")[0][:200]
