"""Countdown: reach a target with the given numbers, each used exactly once.

A task is a multiset of numbers; its target comes from one random way of combining them, so it can always be
reached. Every multiset occurs once: an epoch has no repeats.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from treadle.platform.errors import ConfigError
from treadle.platform.seeds import derive_seed
from treadle.workflows.data.generators.base import Task, letters, require_range

_ATTEMPTS = 64


@dataclass(frozen=True, slots=True)
class _Term:
    value: int
    text: str
    loose: bool  # a sum or difference at the top: needs brackets inside a product


@dataclass(frozen=True, kw_only=True)
class Countdown:
    """`make 35 from 3 4 5: `, answered by an expression such as `(3+4)*5`."""

    kind: str = "countdown"
    numbers: int = 3
    """Numbers per task."""
    max_number: int = 25
    """Numbers are drawn from 1 … this."""
    max_target: int = 100
    """Targets are 1 … this."""
    space: int = 0
    """Chooses another target for every multiset of numbers."""

    @property
    def size(self) -> int:
        return math.comb(self.max_number + self.numbers - 1, self.numbers)

    @property
    def alphabet(self) -> str:
        return letters("0123456789+-*/=(),: ", "make from can")

    def task(self, number: int) -> Task:
        numbers = _multiset(number, self.numbers, self.max_number)
        target, steps, expression = self._solution(numbers)
        given = " ".join(map(str, numbers))
        return Task(
            id=f"countdown-{given.replace(' ', '_')}-{target}",
            text=f"make {target} from {given}: ",
            thinking=",".join(steps),
            answer=expression,
            verifier="countdown",
            payload={"numbers": [*numbers], "target": target},
        )

    def content(self, number: int) -> str:
        return " ".join(map(str, _multiset(number, self.numbers, self.max_number)))

    def corpus_line(self, number: int, draw: int) -> str:
        task = self.task(number)
        if draw % 2:
            return f"{task.answer}={task.payload['target']}"
        given = " ".join(map(str, _multiset(number, self.numbers, self.max_number)))
        return f"from {given} can make {task.payload['target']}: {task.thinking}"

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work."""
        require_range(self.kind, "numbers", self.numbers, 2, 8)
        require_range(self.kind, "max_number", self.max_number, 1, 1000)
        if self.max_target < self.numbers * self.max_number:
            raise ConfigError(
                f"countdown.max_target={self.max_target} is below the largest sum "
                f"{self.numbers * self.max_number}, so some numbers may reach no target at all.",
                "Raise countdown.max_target, or lower countdown.numbers or countdown.max_number.",
            )

    def _solution(self, numbers: list[int]) -> tuple[int, list[str], str]:
        """Target, steps and expression. Combines random pairs until the result is a fair target; the plain
        sum is one in any case."""
        rng = random.Random(derive_seed("countdown", self.space, self.max_target, *numbers))
        for _ in range(_ATTEMPTS):
            last, steps = _combined(numbers, rng)
            if 1 <= last.value <= self.max_target and last.value not in numbers:
                return last.value, steps, last.text
        total, steps = numbers[0], []
        for value in numbers[1:]:
            steps.append(f"{total}+{value}={total + value}")
            total += value
        return total, steps, "+".join(map(str, numbers))


def _combined(numbers: list[int], rng: random.Random) -> tuple[_Term, list[str]]:
    terms = [_Term(n, str(n), False) for n in numbers]
    steps = []
    while len(terms) > 1:
        a = terms.pop(rng.randrange(len(terms)))
        b = terms.pop(rng.randrange(len(terms)))
        sign = rng.choice(_signs(a.value, b.value))
        joined = _join(a, b, sign)
        steps.append(f"{a.value}{sign}{b.value}={joined.value}")
        terms.append(joined)
    return terms[0], steps


def _signs(a: int, b: int) -> str:
    """Operations that stay among positive integers of modest size."""
    return (
        "+" + ("-" if a > b else "") + ("*" if a * b <= 1000 else "") + ("/" if b > 1 and a % b == 0 else "")
    )


def _join(a: _Term, b: _Term, sign: str) -> _Term:
    value = {"+": a.value + b.value, "-": a.value - b.value, "*": a.value * b.value}.get(
        sign, a.value // b.value
    )
    product = sign in "*/"
    left = f"({a.text})" if product and a.loose else a.text
    compound = not b.text.isdigit()
    right = f"({b.text})" if compound and (sign in "-/" or (product and b.loose)) else b.text
    return _Term(value, f"{left}{sign}{right}", not product)


def _multiset(rank: int, count: int, largest: int) -> list[int]:
    """The rank-th non-decreasing sequence of `count` numbers from 1 … largest, in lexicographic order."""
    found, low = [], 1
    for remaining in range(count - 1, -1, -1):
        while (block := math.comb(largest - low + remaining, remaining)) <= rank:
            rank -= block
            low += 1
        found.append(low)
    return found
