"""The stacks of actors that still answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayError

from treadle.actors.calls import call

ANSWER_S = 3.0


async def stacks_of(actors: Mapping[str, Any]) -> dict[str, str]:
    """By name, what each actor's `stacks()` gives, or why there is none. Takes at most `ANSWER_S`."""
    asked = {name: asyncio.ensure_future(_stacks(actor)) for name, actor in actors.items()}
    if asked:
        await asyncio.wait(asked.values(), timeout=ANSWER_S)
    found = {
        name: task.result() if task.done() else f"no answer within {ANSWER_S:g} s"
        for name, task in asked.items()
    }
    for task in asked.values():
        task.cancel()
    return found


async def where(actor: Any) -> str:
    """In which functions an actor that does not answer hangs, or that it does not even say that. Takes at most
    `ANSWER_S`: the actor has a thread for this question."""
    try:
        async with asyncio.timeout(ANSWER_S):
            places = str(await call(actor, "where"))
    except (RayError, TimeoutError):
        return "it does not say where (it has not started, hangs as a whole, is frozen, or is cut off)"
    return f"it hangs {places}" if places else "it hangs outside of our code"


async def _stacks(actor: Any) -> str:
    try:
        return str(await call(actor, "stacks"))
    except RayError as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
