"""What the client asks of a verify actor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from treadle.platform.records import Drawn, Json, StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeRequest:
    """One group to judge; the completions travel beside it, by reference. `finished` has one entry per
    sample, false where the completion was cut off at the length limit.

    Example: `JudgeRequest(group_id="grpo-0/17", prompt_id="addition-47+85", verifier="exact",
    payload={"answer": "132"}, finished=(True, False))`.
    """

    group_id: str
    prompt_id: str
    verifier: str
    payload: Mapping[str, Json]
    finished: tuple[bool, ...]


def judge_request(drawn: Drawn) -> JudgeRequest:
    """The part of a drawn group that judging needs: no token arrays."""
    return JudgeRequest(
        group_id=drawn.id,
        prompt_id=drawn.prompt.id,
        verifier=drawn.prompt.verifier,
        payload=dict(drawn.prompt.payload),
        finished=tuple(stop is not StopReason.LENGTH for stop in drawn.stops),
    )
