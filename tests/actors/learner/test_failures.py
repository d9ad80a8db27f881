"""Which of several ranks' failures is told as the cause."""

from __future__ import annotations

from ray.exceptions import ActorDiedError, OutOfMemoryError

from treadle.actors.learner.failures import dead, diagnose, refused_by_all
from treadle.actors.learner.heartbeat import struck
from treadle.platform.errors import LearnerError

PEER = RuntimeError("Connection closed by peer")


def test_a_rank_that_ray_ends_for_want_of_memory_is_the_cause_and_not_its_peers() -> None:
    failures = [PEER, OutOfMemoryError("2 worker(s) were killed due to the node running low on memory ...")]
    error = diagnose("step 4", failures, "rank 0: waiting.")
    assert dead(failures) == [1]
    assert isinstance(error, LearnerError)
    assert error.message.startswith(
        "learner.step 4: rank 1 died (its node ran out of memory, and Ray ended its process)."
    )
    assert "learner.max_tokens_per_microbatch" in error.remedy


def test_a_rank_without_memory_that_lives_is_the_cause_and_not_its_peers() -> None:
    error = diagnose("step 4", [PEER, MemoryError()], "rank 0: waiting.")
    assert error.message == "learner.step 4: rank 1 ran out of memory (MemoryError). rank 0: waiting."
    assert "learner.max_tokens_per_microbatch" in error.remedy


def test_a_rank_that_the_kernel_ended_is_told_where_its_node_has_struck() -> None:
    failures = [PEER, ActorDiedError()]
    plain = diagnose("step 4", failures, "")
    told = diagnose("step 4", failures, "", struck=True)
    assert "memory" not in plain.message
    assert "its node ran out of memory: the kernel ended a process there at that time" in told.message
    assert "learner.max_tokens_per_microbatch" in told.remedy
    assert not refused_by_all(failures)


def test_the_kernel_has_struck_where_a_neighbour_of_the_dead_rank_counts_one_more() -> None:
    before = [("a", 3), ("a", 3), ("b", 0), ("b", 0)]
    assert struck(before, [("a", 4), None, ("b", 0), ("b", 0)], [1])
    assert not struck(before, [("a", 3), None, ("b", 1), ("b", 1)], [1]), "another node's"
    assert not struck(before, [None, None, ("b", 1), ("b", 1)], [0, 1]), "nobody is left to ask"
    assert not struck((), [("a", 4)], [0]), "the ranks had not met"


def test_a_lack_of_memory_is_told_with_the_node_of_its_ranks() -> None:
    nodes = ["0a" * 16, "1b" * 16]
    alive = diagnose("step 4", [PEER, MemoryError()], "", nodes=nodes)
    ended = diagnose("step 4", [PEER, OutOfMemoryError("killed")], "", nodes=nodes)
    kernel = diagnose("step 4", [PEER, ActorDiedError()], "", struck=True, nodes=nodes)
    assert alive.message.startswith("learner.step 4: rank 1 ran out of memory (MemoryError; node 1b1b1b1b).")
    assert "and Ray ended its process; node 1b1b1b1b)" in ended.message
    assert "ended a process there at that time; node 1b1b1b1b)" in kernel.message
    assert (
        "node" not in diagnose("step 4", [PEER, ActorDiedError()], "", nodes=nodes).message.split("rank 1")[1]
    )
