"""Chains of additions and subtractions, worked from left to right."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.workflows.data.generators.base import Task, letters, numbered, require_range


@dataclass(frozen=True, kw_only=True)
class Chain:
    """`12+7-5=`; running totals may go below zero."""

    kind: str = "chain"
    terms: int = 4
    """Numbers in a chain."""
    digits: int = 1
    """Largest number of digits of a number."""

    @property
    def size(self) -> int:
        return 10 ** (self.digits * self.terms) * 2 ** (self.terms - 1)

    @property
    def alphabet(self) -> str:
        return letters("0123456789+-=, ", "plus minus is")

    def task(self, number: int) -> Task:
        values, signs = self._parts(number)
        text = self._text(values, signs)
        total, steps = values[0], []
        for sign, value in zip(signs, values[1:], strict=True):
            after = total - value if sign else total + value
            steps.append(f"{total}{'+-'[sign]}{value}={after}")
            total = after
        return Task(
            id=f"chain-{text}",
            text=f"{text}=",
            thinking=",".join(steps),
            answer=str(total),
            verifier="exact",
            payload={"answer": str(total)},
        )

    def content(self, number: int) -> str:
        return self._text(*self._parts(number))

    def corpus_line(self, number: int, draw: int) -> str:
        task = self.task(number)
        if draw % 2:
            return f"{task.text[:-1]} is {task.answer}"
        values, signs = self._parts(number)
        words = "".join(f" {('plus', 'minus')[s]} {v}" for s, v in zip(signs, values[1:], strict=True))
        return f"{values[0]}{words} is {task.thinking.rsplit('=', 1)[1]}"

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work."""
        require_range(self.kind, "terms", self.terms, 2, 12)
        require_range(self.kind, "digits", self.digits, 1, 6)

    @staticmethod
    def _text(values: list[int], signs: list[int]) -> str:
        return str(values[0]) + "".join(f"{'+-'[s]}{v}" for s, v in zip(signs, values[1:], strict=True))

    def _parts(self, number: int) -> tuple[list[int], list[int]]:
        radices = [10**self.digits] * self.terms + [2] * (self.terms - 1)
        digits = numbered(number, *radices)
        return digits[: self.terms], digits[self.terms :]
