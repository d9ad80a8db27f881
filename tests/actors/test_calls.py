from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from treadle.actors.calls import TRIES, call, call_once, once


class Counter:
    """An actor's class: what it has done is what it counts."""

    def __init__(self) -> None:
        self.count = 0

    @once
    def add(self, amount: int) -> int:
        self.count += amount
        return self.count

    @once
    async def add_slowly(self, amount: int) -> int:
        self.count += amount
        await asyncio.sleep(0.02)
        return self.count

    @once
    def fail(self) -> None:
        self.count += 1
        raise ValueError(f"failure {self.count}")

    def plain(self, amount: int) -> int:
        self.count += amount
        return self.count


class Line:
    """An actor's handle with one method, `do`, whose requests or answers get lost: "request", "answer", or "" for
    neither, call by call."""

    def __init__(self, method: Callable[..., Any], *losses: str) -> None:
        self._method, self._losses = method, list(losses)
        self.sent = 0
        self.do = self

    async def remote(self, *args: Any, **kwargs: Any) -> Any:
        self.sent += 1
        lost = self._losses.pop(0) if self._losses else ""
        if lost == "request":
            raise ActorUnavailableError("the request is lost", None)
        answer = self._method(*args, **kwargs)
        if asyncio.iscoroutine(answer):
            answer = await answer
        if lost == "answer":
            raise ActorUnavailableError("the answer is lost", None)
        return answer


@pytest.mark.parametrize("method", ["add", "add_slowly"])
@pytest.mark.parametrize("losses", [(), ("request",), ("answer",), ("answer", "request", "answer", "answer")])
def test_a_call_is_carried_out_once_whatever_is_lost(method: str, losses: tuple[str, ...]) -> None:
    counter = Counter()
    line = Line(getattr(counter, method), *losses)
    assert asyncio.run(call_once(line, "do", 5)) == 5
    assert counter.count == 5
    assert line.sent == 1 + len(losses)


def test_a_call_that_may_be_repeated_is() -> None:
    counter = Counter()
    assert asyncio.run(call(Line(counter.plain, "answer"), "do", 5)) == 10


def test_an_error_is_told_again_not_made_again() -> None:
    counter = Counter()
    line = Line(counter.fail)

    async def twice() -> None:
        for _ in range(2):
            with pytest.raises(ValueError, match="failure 1"):
                await line.remote(call="a")

    asyncio.run(twice())
    assert counter.count == 1


def test_two_calls_are_two_calls() -> None:
    counter = Counter()

    async def use() -> list[int]:
        lines = [Line(counter.add), Line(counter.add_slowly)]
        return [await call_once(line, "do", 1) for line in (*lines, *lines)]

    assert asyncio.run(use()) == [1, 2, 3, 4]


def test_a_repeated_call_waits_for_the_first() -> None:
    counter = Counter()

    async def use() -> list[int]:
        return list(
            await asyncio.gather(
                counter.add_slowly(5, call="a"),
                counter.add_slowly(5, call="a"),
                counter.add_slowly(7, call="b"),
            )
        )

    assert asyncio.run(use()) == [12, 12, 12]


def test_an_actor_that_stays_out_of_reach_is_given_up() -> None:
    line = Line(Counter().add, *["request"] * TRIES)
    with pytest.raises(ActorUnavailableError):
        asyncio.run(call_once(line, "do", 1))
    assert line.sent == TRIES


def test_a_dead_actor_is_not_asked_again() -> None:
    class Dead:
        asked = 0

        @property
        def do(self) -> Dead:
            return self

        async def remote(self, *_: Any, **__: Any) -> None:
            self.asked += 1
            raise ActorDiedError

    dead = Dead()
    with pytest.raises(ActorDiedError):
        asyncio.run(call_once(dead, "do", 1))
    assert dead.asked == 1


def test_without_a_client_that_names_its_calls_a_method_is_an_ordinary_one() -> None:
    counter = Counter()
    assert [counter.add(1), counter.add(1)] == [1, 2]
