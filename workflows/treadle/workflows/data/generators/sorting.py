"""Sorting a list of numbers, worked by taking the smallest again and again."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.workflows.data.generators.base import Task, letters, numbered, require_range


def selection(values: list[int]) -> str:
    """The smallest of what is left, step by step. Example: 5 3 9 → `3 of 5 3 9,5 of 5 9,9 of 9`."""
    left, steps = list(values), []
    while left:
        steps.append(f"{min(left)} of {' '.join(map(str, left))}")
        left.remove(min(left))
    return ",".join(steps)


@dataclass(frozen=True, kw_only=True)
class Sorting:
    """`sort 5 3 9: ` for all lists of `length` numbers from 0 … `max_number`."""

    kind: str = "sorting"
    length: int = 4
    """Numbers in a list."""
    max_number: int = 99

    @property
    def size(self) -> int:
        return (self.max_number + 1) ** self.length

    @property
    def alphabet(self) -> str:
        return letters("0123456789,: ", "sort of in order")

    def task(self, number: int) -> Task:
        values = numbered(number, *[self.max_number + 1] * self.length)
        given = " ".join(map(str, values))
        answer = " ".join(map(str, sorted(values)))
        return Task(
            id=f"sorting-{given.replace(' ', '_')}",
            text=f"sort {given}: ",
            thinking=selection(values),
            answer=answer,
            verifier="exact",
            payload={"answer": answer},
        )

    def content(self, number: int) -> str:
        return " ".join(map(str, numbered(number, *[self.max_number + 1] * self.length)))

    def corpus_line(self, number: int, draw: int) -> str:
        task = self.task(number)
        if draw % 2:
            return f"in order: {task.answer}"
        return f"{self.content(number)} in order: {task.answer}"

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work."""
        require_range(self.kind, "length", self.length, 2, 16)
        require_range(self.kind, "max_number", self.max_number, 1, 10**6)
