"""Whether the ranks live: they answer on a thread of their own, so that one that hangs is told from one that works."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayError

from treadle.actors.calls import call
from treadle.platform.stacks import WAITS

IDLE = "idle"
ANSWER_S = 3.0
"""How long a living process may take to say what it is doing."""
_LOOKS, _LOOK_AGAIN_S = 4, 0.5


async def phases(actors: Sequence[Any]) -> list[str]:
    """What each rank says it is doing, and where; nothing where it is dead or frozen. Takes at most `ANSWER_S`."""
    asked = [asyncio.ensure_future(_phase(actor)) for actor in actors]
    if asked:
        await asyncio.wait(asked, timeout=ANSWER_S)
    said = [task.result() if task.done() else "" for task in asked]
    for task in asked:
        task.cancel()
    return said


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


async def silence(actors: Sequence[Any], heartbeat_s: float, deadline_s: float) -> str:
    """Which rank has not answered for `deadline_s`, and what it was doing before.

    consumes: phases; waits for: each rank's answer, asked for every `heartbeat_s`; unblocked by: a silent rank, or
    being cancelled; produces: a sentence. The death of a rank ends its calls, and is nothing for this.
    """
    listening = {asyncio.ensure_future(_listen(r, a, heartbeat_s, deadline_s)) for r, a in enumerate(actors)}
    try:
        while listening:
            ended, listening = await asyncio.wait(listening, return_when=asyncio.FIRST_COMPLETED)
            if silent := [said for task in ended if (said := task.result())]:
                return " ".join(silent)
        return await asyncio.get_running_loop().create_future()
    finally:
        for task in listening:
            task.cancel()


async def _listen(rank: int, actor: Any, heartbeat_s: float, deadline_s: float) -> str:
    before = ""
    while True:
        await asyncio.sleep(heartbeat_s)
        try:
            async with asyncio.timeout(deadline_s):
                before = await call(actor, "phase")
        except TimeoutError:
            doing = f"; before, it was: {before}" if before else ""
            return f"rank {rank} has been silent for {deadline_s:g} s{doing}."
        except RayError:
            return ""


async def _phase(actor: Any) -> str:
    try:
        return str(await call(actor, "phase"))
    except RayError:
        return ""
