"""Whether the ranks live: they answer on a thread of their own, so that one that hangs is told from one that works."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray.exceptions import RayError

from treadle.actors.calls import call
from treadle.platform.stacks import WAITS

IDLE = "idle"
ANSWER_S = 3.0
"""How long a living process may take to say what it is doing."""
_LOOKS, _LOOK_AGAIN_S = 4, 0.5


async def phases(actors: Sequence[Any], silent: Collection[int] = ()) -> list[str]:
    """What each rank says it is doing, and where; nothing where it is dead or frozen. Takes at most `ANSWER_S`, and no
    time at all for ranks that are known to be silent."""
    answers = iter(await _answers([a for rank, a in enumerate(actors) if rank not in silent], "phase"))
    return ["" if rank in silent else str(next(answers) or "") for rank in range(len(actors))]


async def kernel_kills(actors: Sequence[Any]) -> list[tuple[str, int] | None]:
    """Of each rank that answers, its node and how many processes the kernel has ended there for want of memory."""
    return [answer or None for answer in await _answers(actors, "kernel_kills")]


def struck(
    before: Sequence[tuple[str, int] | None], after: Sequence[tuple[str, int] | None], ranks: Sequence[int]
) -> bool:
    """Whether the kernel has ended a process on the node of one of the ranks; its neighbours there know."""
    now = dict(filter(None, after))
    known = [before[rank] for rank in ranks if rank < len(before)]
    return any(now.get(node, 0) > kills for node, kills in filter(None, known))


def listed(said: Sequence[str]) -> str:
    """The answers of `phases` in one sentence."""
    return "; ".join(f"rank {rank}: {phase or 'no answer'}" for rank, phase in enumerate(said)) + "."


def culprits(late: Sequence[int], said: Sequence[str]) -> list[int]:
    """Of the ranks that are late, those that do not wait for another one: all where everybody does."""
    return [rank for rank in late if WAITS not in said[rank]] or list(late)


async def unfit(actors: Sequence[Any]) -> str:
    """Why the ranks cannot go on, or nothing. For a moment in which no call is under way: a rank that does not become
    idle soon is stuck in a call that was given up."""
    said: list[str] = []
    for look in range(_LOOKS):
        if look:
            await asyncio.sleep(_LOOK_AGAIN_S)
        said = await phases(actors)
        if all(phase.startswith(IDLE) for phase in said):
            return ""
    return listed(said)


async def silence(actors: Sequence[Any], heartbeat_s: float, deadline_s: float) -> Mapping[int, str]:
    """Which ranks have not answered for `deadline_s`: a sentence each, which says what it was doing before.

    consumes: phases; waits for: each rank's answer, asked for every `heartbeat_s`; unblocked by: a silent rank, or
    being cancelled; produces: sentences. The death of a rank ends its calls, and is nothing for this.
    """
    listening = {asyncio.ensure_future(_listen(r, a, heartbeat_s, deadline_s)) for r, a in enumerate(actors)}
    try:
        while listening:
            ended, listening = await asyncio.wait(listening, return_when=asyncio.FIRST_COMPLETED)
            if silent := {rank: said for rank, said in (task.result() for task in ended) if said}:
                return silent
        return await asyncio.get_running_loop().create_future()
    finally:
        for task in listening:
            task.cancel()


async def _listen(rank: int, actor: Any, heartbeat_s: float, deadline_s: float) -> tuple[int, str]:
    before = ""
    while True:
        await asyncio.sleep(heartbeat_s)
        try:
            async with asyncio.timeout(deadline_s):
                before = await call(actor, "phase")
        except TimeoutError:
            doing = f"; before, it was: {before}" if before else ""
            return rank, f"rank {rank} has been silent for {deadline_s:g} s{doing}."
        except RayError:
            return rank, ""


async def _answers(actors: Sequence[Any], question: str) -> list[Any]:
    """What each rank answers within `ANSWER_S`; None where it does not."""
    asked = [asyncio.ensure_future(_answer(actor, question)) for actor in actors]
    if asked:
        await asyncio.wait(asked, timeout=ANSWER_S)
    answers = [task.result() if task.done() else None for task in asked]
    for task in asked:
        task.cancel()
    return answers


async def _answer(actor: Any, question: str) -> Any:
    try:
        return await call(actor, question)
    except RayError:
        return None
