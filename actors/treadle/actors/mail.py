"""Many small questions to one actor in few calls.

An actor call has a price on either side, whatever it carries (`tests/benchmarks/bench_mail.py`). The client sends
what was asked for at the same moment in one call and fetches the answers that have gathered meanwhile in
another; an answer never waits for a slower question that happened to travel with it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from treadle.platform.errors import RoleError, TreadleError

_log = logging.getLogger(__name__)
QuestionT = TypeVar("QuestionT")
AnswerT = TypeVar("AnswerT")
POLL_S = 20.0
"""An actor that has nothing to say answers a fetch after this long, empty-handed."""


@dataclass(frozen=True, slots=True)
class Letter(Generic[QuestionT]):
    """A question; `ticket` is the client's number for it."""

    ticket: int
    question: QuestionT


@dataclass(frozen=True, slots=True)
class Reply(Generic[AnswerT]):
    """What became of a question: its answer, or why there is none."""

    ticket: int
    answer: AnswerT | None = None
    error: TreadleError | None = None


class Mailbox(Generic[QuestionT, AnswerT]):
    """The actor's side: answers what comes in, each question in a task of its own, and keeps the replies until
    they are fetched. Lives on one event loop and serves one client."""

    def __init__(self, name: str, answer: Callable[[QuestionT], Awaitable[AnswerT]], linger_s: float) -> None:
        """`name` begins the message of an error nobody foresaw; `linger_s` is how long a fetch waits for more
        replies once there is one and others are on their way."""
        self._name = name
        self._answer = answer
        self._linger_s = linger_s
        self._replies: list[Reply[AnswerT]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._quiet = asyncio.Event()

    def post(self, letters: Sequence[Letter[QuestionT]]) -> None:
        """Takes questions in; returns at once."""
        for letter in letters:
            task = asyncio.get_running_loop().create_task(self._reply(letter))
            self._tasks.add(task)
            self._quiet.clear()

    async def fetch(self) -> list[Reply[AnswerT]]:
        """Replies not fetched before, in the order of their arrival; none after `POLL_S` without any."""
        if not await _within(POLL_S, self._news):
            return []
        if self._tasks:
            await _within(self._linger_s, self._quiet)
        replies, self._replies = self._replies, []
        self._news.clear()
        return replies

    async def _reply(self, letter: Letter[QuestionT]) -> None:
        reply: Reply[AnswerT]
        try:
            reply = Reply(letter.ticket, answer=await self._answer(letter.question))
        except TreadleError as error:
            reply = Reply(letter.ticket, error=error)
        except Exception as error:  # noqa: BLE001  the one who asked must hear of it, and nobody else
            _log.exception("%s: a question could not be answered", self._name)
            message = f"{self._name}: {type(error).__name__}: {error}"
            reply = Reply(letter.ticket, error=RoleError(message, "See the actor's log for the traceback."))
        self._replies.append(reply)
        self._news.set()
        task = asyncio.current_task()
        assert task is not None
        self._tasks.discard(task)
        if not self._tasks:
            self._quiet.set()


class Courier(Generic[QuestionT, AnswerT]):
    """The client's side.

    consumes: questions; waits for: the actor's next replies; unblocked by: them, or the end of a call with an
    error (the actor's death), which every question in flight then raises; produces: answers.
    A frozen actor answers nothing: whoever asks has a deadline of its own, and whoever owns the actor kills it.
    """

    def __init__(
        self,
        post: Callable[[Sequence[Letter[QuestionT]]], Awaitable[None]],
        fetch: Callable[[], Awaitable[Sequence[Reply[AnswerT]]]],
    ) -> None:
        """`post` and `fetch` call the mailbox's methods in the actor, and raise when the actor is gone."""
        self._post = post
        self._fetch = fetch
        self._tickets = itertools.count()
        self._waiting: dict[int, asyncio.Future[AnswerT]] = {}
        self._outbox: list[Letter[QuestionT]] = []
        self._posting: set[asyncio.Task[None]] = set()
        self._fetching: asyncio.Task[None] | None = None

    async def ask(self, question: QuestionT) -> AnswerT:
        """The answer, or what the actor raised. A caller that is cancelled leaves the rest of the mail alone."""
        loop = asyncio.get_running_loop()
        ticket = next(self._tickets)
        self._waiting[ticket] = answer = loop.create_future()
        self._outbox.append(Letter(ticket, question))
        if len(self._outbox) == 1:
            loop.call_soon(self._send)
        try:
            return await answer
        finally:
            del self._waiting[ticket]

    def _send(self) -> None:
        letters, self._outbox = self._outbox, []
        task = asyncio.get_running_loop().create_task(self._posted(letters))
        self._posting.add(task)
        task.add_done_callback(self._posting.discard)
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.get_running_loop().create_task(self._fetched())

    async def _posted(self, letters: Sequence[Letter[QuestionT]]) -> None:
        try:
            await self._post(letters)
        except Exception as error:  # noqa: BLE001  whoever asked decides
            self._fail([letter.ticket for letter in letters], error)

    async def _fetched(self) -> None:
        try:
            while self._waiting:
                for reply in await self._fetch():
                    self._deliver(reply)
        except Exception as error:  # noqa: BLE001  whoever asked decides
            self._fail(list(self._waiting), error)

    def _deliver(self, reply: Reply[AnswerT]) -> None:
        waiting = self._waiting.get(reply.ticket)
        if waiting is None or waiting.done():
            return  # its caller has given up
        if reply.error is not None:
            waiting.set_exception(reply.error)
        else:
            waiting.set_result(cast(AnswerT, reply.answer))  # set wherever there is no error

    def _fail(self, tickets: Sequence[int], error: Exception) -> None:
        for ticket in tickets:
            waiting = self._waiting.get(ticket)
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)


async def _within(limit_s: float, event: asyncio.Event) -> bool:
    try:
        await asyncio.wait_for(event.wait(), limit_s)
    except TimeoutError:
        return False
    return True
