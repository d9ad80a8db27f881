"""Ray's page about a dead actor, as one clause."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayError

from treadle.actors.deaths import GONE, why

KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: RolloutActor
\tactor_id: 414deced34d4efb25469351c01000000
\tpid: 30499
\tnamespace: treadle
\tip: 127.0.0.1
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed
by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly."""
NODE = """The actor died unexpectedly before finishing this task.
\tclass_name: RolloutActor
\tpid: 31
The actor died because its node has died. Node Id: 8a5955b60c1f the actor's node was terminated unexpectedly."""


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        (KILLED, "its process 30499 was killed or crashed"),
        (NODE, "its node died"),
        (
            KILLED.replace("SYSTEM_ERROR", "NODE_OUT_OF_MEMORY"),
            "its node ran out of memory, and Ray ended its process",
        ),
        (
            KILLED.replace("SYSTEM_ERROR", "INTENDED_USER_EXIT"),
            "its process 30499 ended (INTENDED_USER_EXIT)",
        ),
        ("Something else. And more of it.", "Something else"),
    ],
)
def test_a_page_becomes_a_clause(text: str, clause: str) -> None:
    assert why(RayError(text)) == clause


def test_an_actor_that_may_come_back_is_not_called_dead() -> None:
    assert why(ActorUnavailableError("the network is down", None)) == "it cannot be reached at the moment"


def test_a_worker_that_ray_ends_for_want_of_memory_is_gone_and_told_as_such() -> None:
    """Ray's error for it is none of an actor's."""
    error = OutOfMemoryError("Task was killed due to the node running low on memory.")
    assert isinstance(error, GONE)
    assert why(error) == "its node ran out of memory, and Ray ended its process"
