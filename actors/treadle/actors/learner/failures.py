"""Which of several failures of one call was the cause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from ray.exceptions import RayError, RayTaskError

from treadle.actors.deaths import GONE, why
from treadle.platform.errors import LearnerError, TreadleError
from treadle.platform.memory import PHRASE, REMEDIES, STRUCK, ran_out, remedy

GRACE_S = 5.0
RankFailure: TypeAlias = BaseException


def dead(failures: Sequence[RankFailure | None]) -> list[int]:
    """The ranks whose process is gone."""
    return [rank for rank, failure in enumerate(failures) if isinstance(failure, GONE)]


def diagnose(
    what: str,
    failures: Sequence[RankFailure | None],
    phases: str,
    struck: bool = False,
    nodes: Sequence[str] = (),
) -> TreadleError:
    """The error to raise for a call whose ranks failed as given (None: it did not fail). `struck`: the kernel has ended
    a process on the node of one that is gone. `nodes` are the ranks', as far as they are known.

    A death comes first, since its peers fail in their collectives because of it; then an error of ours, which
    says what to change and is passed on as it is; then anything else.
    """
    failed = [(rank, failure) for rank, failure in enumerate(failures) if failure is not None]
    if gone := dead(failures):
        first_death = failures[gone[0]]
        assert isinstance(first_death, RayError)
        cause = why(first_death)
        if struck and PHRASE not in cause:
            cause = f"{cause}; {STRUCK}"
        if PHRASE in cause:
            cause += _on(gone, nodes)
        otherwise = "Resume from the last checkpoint; look at the rank's log and for a lack of memory."
        return LearnerError(
            f"learner.{what}: rank {', '.join(map(str, gone))} died ({cause}). {phases}",
            remedy("learner", cause, otherwise),
        )
    causes = [(rank, _cause(failure)) for rank, failure in failed]
    for rank, cause_error in causes:
        if isinstance(cause_error, TreadleError):
            return type(cause_error)(
                f"learner.{what}: rank {rank}: {cause_error.message}", cause_error.remedy
            )
    for rank, cause_error in causes:
        if ran_out(cause_error):
            return LearnerError(
                f"learner.{what}: rank {rank} {PHRASE} ({type(cause_error).__name__} {cause_error}".rstrip()
                + f"{_on([rank], nodes)}). {phases}",
                REMEDIES["learner"],
            )
    rank, first = causes[0]
    return LearnerError(
        f"learner.{what}: rank {rank} failed: {type(first).__name__}: {first}. {phases}",
        "Look at the rank's log.",
    )


def refused_by_all(failures: Sequence[RankFailure | None]) -> bool:
    """Whether every rank declined the call with an error of ours (a missing file, a bad setting)."""
    return all(f is not None and isinstance(_cause(f), TreadleError) for f in failures)


def _on(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """Where the ranks are, by the first letters of the nodes' ids."""
    known = dict.fromkeys(nodes[rank][:8] for rank in ranks if rank < len(nodes) and nodes[rank])
    return f"; node {', '.join(known)}" if known else ""


def _cause(failure: RankFailure) -> BaseException:
    cause = failure.cause if isinstance(failure, RayTaskError) else None
    return cause if isinstance(cause, BaseException) else failure
