"""Courier and mailbox: many questions in few calls, and no answer waits for another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from treadle.actors import mail
from treadle.actors.mail import Courier, Letter, Mailbox, Reply
from treadle.platform.errors import DataError, RoleError

Answer = Callable[[str], Awaitable[str]]


class Post:
    """Carries mail between the two sides and counts the calls."""

    def __init__(self, answer: Answer, linger_s: float = 0.01) -> None:
        self.box = Mailbox("test/ask", answer, linger_s)
        self.posted: list[int] = []
        self.fetched: list[int] = []
        self.dead: Exception | None = None
        self.courier: Courier[str, str] = Courier(self.post, self.fetch)

    async def post(self, letters: Sequence[Letter[str]]) -> None:
        if self.dead is not None:
            raise self.dead
        self.posted.append(len(letters))
        self.box.post(letters)

    async def fetch(self) -> list[Reply[str]]:
        replies = await self.box.fetch()
        if self.dead is not None:
            raise self.dead
        self.fetched.append(len(replies))
        return replies


async def echoed(question: str) -> str:
    return question.upper()


def test_questions_of_one_moment_travel_in_one_call_and_so_do_their_answers() -> None:
    async def go() -> None:
        post = Post(echoed)
        answers = await asyncio.gather(*(post.courier.ask(q) for q in "abcde"))
        assert answers == list("ABCDE")
        assert (post.posted, post.fetched[0]) == ([5], 5)

    asyncio.run(go())


def test_an_answer_does_not_wait_for_a_slower_question_that_came_with_it() -> None:
    async def go() -> None:
        slow = asyncio.Event()

        async def answer(question: str) -> str:
            if question == "slow":
                await slow.wait()
            return question

        post = Post(answer)
        late = asyncio.create_task(post.courier.ask("slow"))
        assert await asyncio.wait_for(post.courier.ask("quick"), 5) == "quick"
        assert not late.done()
        slow.set()
        assert await asyncio.wait_for(late, 5) == "slow"

    asyncio.run(go())


def test_an_error_reaches_the_one_who_asked_and_only_him() -> None:
    async def go() -> None:
        async def answer(question: str) -> str:
            if question == "bad":
                raise DataError("prompt 7 cannot fit.", "Shorten it.")
            if question == "odd":
                raise ZeroDivisionError("division by zero")
            return question

        post = Post(answer)
        asked = [post.courier.ask(q) for q in ("bad", "good", "odd")]
        bad, good, odd = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(bad, DataError)
        assert bad.remedy == "Shorten it."
        assert good == "good"
        assert isinstance(odd, RoleError)
        assert odd.message == "test/ask: ZeroDivisionError: division by zero"

    asyncio.run(go())


@pytest.mark.parametrize("dies_while", ["posting", "fetching"])
def test_the_death_of_the_actor_ends_every_question_in_flight(dies_while: str) -> None:
    async def go() -> None:
        asking = asyncio.Event()

        async def answer(question: str) -> str:
            asking.set()
            await asyncio.sleep(0.02)
            return question

        post = Post(answer)
        if dies_while == "posting":
            post.dead = RoleError("the actor is gone")
        tasks = [asyncio.create_task(post.courier.ask(q)) for q in "ab"]
        if dies_while == "fetching":
            await asking.wait()
            post.dead = RoleError("the actor is gone")
        found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert [str(error) for error in found] == ["the actor is gone"] * 2

    asyncio.run(go())


def test_a_caller_that_gives_up_leaves_the_others_their_answers() -> None:
    async def go() -> None:
        release = asyncio.Event()

        async def answer(question: str) -> str:
            await release.wait()
            return question

        post = Post(answer)
        impatient, patient = (asyncio.create_task(post.courier.ask(q)) for q in "ab")
        await asyncio.sleep(0.01)
        impatient.cancel()
        release.set()
        assert await asyncio.wait_for(patient, 5) == "b"
        assert await asyncio.wait_for(post.courier.ask("c"), 5) == "c"

    asyncio.run(go())


def test_a_fetch_that_finds_nothing_returns_empty_handed_and_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mail, "POLL_S", 0.01)

    async def go() -> None:
        async def answer(question: str) -> str:
            await asyncio.sleep(0.1)
            return question

        post = Post(answer)
        assert await asyncio.wait_for(post.courier.ask("a"), 5) == "a"
        assert post.fetched[0] == 0
        assert post.fetched[-1] == 1

    asyncio.run(go())
