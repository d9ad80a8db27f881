"""Calls of actors that a hiccup of the network neither loses nor makes twice.

Ray gives a call up as soon as its request or its answer is lost while the actor lives (`ActorUnavailableError`),
and cannot say whether it was carried out. The client asks again under the same name; the actor, where it matters,
remembers what it answered (`once`).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from ray.exceptions import ActorUnavailableError

_log = logging.getLogger(__name__)
T = TypeVar("T")
MethodT = TypeVar("MethodT", bound=Callable[..., Any])
TRIES = 5
"""Each costs Ray a second or two to find out that the actor has not died."""
_PAUSE_S = 0.1
_REMEMBERED = 16
"""Of each coroutine: as many may be under way together. Of another method, whose client waits for one call before
it makes the next, the last: an answer may hold weights in the object store."""


async def again(doing: str, submit: Callable[[], Awaitable[T]]) -> T:
    """The answer of the call that `submit` makes, which is made again while the actor cannot be reached. `doing` is
    what the log calls it.

    Raises what the call raises, and `ActorUnavailableError` after `TRIES` in vain.
    """
    for attempt in range(1, TRIES):
        try:
            return await submit()
        except ActorUnavailableError:
            _log.warning("%s: the actor could not be reached (try %d of %d)", doing, attempt, TRIES)
            await asyncio.sleep(_PAUSE_S * attempt)
    return await submit()


async def call(actor: Any, method: str, *args: Any) -> Any:
    """Calls a method that may be carried out twice."""
    return await again(method, lambda: getattr(actor, method).remote(*args))


async def call_once(actor: Any, method: str, *args: Any) -> Any:
    """Calls a method that is declared `once`."""
    name = uuid.uuid4().hex
    return await again(method, lambda: getattr(actor, method).remote(*args, call=name))


def once(method: MethodT) -> MethodT:
    """An actor's method that is carried out once per call, however often the call arrives.

    It takes one keyword more, `call`: a repeated one waits for the first and has its answer, or its error. Without a
    `call` it is an ordinary method. Methods that are no coroutines must run on one thread.
    """
    signature = inspect.signature(method)
    by_name = inspect.Parameter("call", inspect.Parameter.KEYWORD_ONLY, default="", annotation="str")

    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def wrapper(self: Any, *args: Any, call: str = "") -> Any:
            if not call:
                return await method(self, *args)
            answers = _answers(self, method)
            task = answers.get(call)
            if task is None:
                task = answers[call] = asyncio.get_running_loop().create_task(method(self, *args))
                _forget(answers)
            return await asyncio.shield(task)

    else:

        @functools.wraps(method)
        def wrapper(self: Any, *args: Any, call: str = "") -> Any:
            answers = _answers(self, method)
            if not call or call not in answers:
                answers.clear()
                answers[call] = _outcome(method, self, args)
            return answers[call]()

    # Ray checks arguments against the signature, and looks for it through all wrappers.
    del wrapper.__wrapped__
    wrapper.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), by_name]
    )
    return wrapper  # type: ignore[return-value]


def _outcome(method: Callable[..., T], self: Any, args: tuple[Any, ...]) -> Callable[[], T]:
    try:
        value = method(self, *args)
    except Exception as error:  # noqa: BLE001  whoever asks again has it too
        raised = error
    else:
        return lambda: value

    def fail() -> T:
        raise raised

    return fail


def _answers(actor: Any, method: Callable[..., Any]) -> dict[str, Any]:
    """By call, what the actor's method answered: a task, or what gives the answer."""
    by_method: dict[str, dict[str, Any]] = actor.__dict__.setdefault("_answers", {})
    return by_method.setdefault(method.__name__, {})


def _forget(tasks: dict[str, asyncio.Task[Any]]) -> None:
    for old in list(tasks)[:-_REMEMBERED]:
        if tasks[old].done():
            del tasks[old]
