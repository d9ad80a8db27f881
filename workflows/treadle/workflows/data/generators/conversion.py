"""Converting numbers between bases, worked digit by digit."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.platform.errors import ConfigError
from treadle.workflows.data.generators.base import Task, letters, require_range

DIGITS = "0123456789abcdef"


def in_base(value: int, base: int) -> str:
    """The number written in a base from 2 to 16. Example: 10, 2 → `1010`."""
    digits = ""
    while True:
        value, digit = divmod(value, base)
        digits = DIGITS[digit] + digits
        if not value:
            return digits


def _read(text: str, base: int) -> list[str]:
    """Horner's rule from the first digit on. Example: `101`, 2 → `1*2+0=2`, `2*2+1=5`."""
    steps, value = [], DIGITS.index(text[0])
    for digit in text[1:]:
        after = value * base + DIGITS.index(digit)
        steps.append(f"{value}*{base}+{DIGITS.index(digit)}={after}")
        value = after
    return steps


def _written(value: int, base: int) -> list[str]:
    """Repeated division, last digit first. Example: 5, 2 → `5=2*2+1`, `2=1*2+0`, `1=0*2+1`."""
    steps = []
    while True:
        quotient, digit = divmod(value, base)
        steps.append(f"{value}={quotient}*{base}+{digit}")
        value = quotient
        if not value:
            return steps


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """`base 2 101101 to base 10: ` for all numbers up to `max_value`."""

    kind: str = "conversion"
    source_base: int = 2
    target_base: int = 10
    max_value: int = 1023

    @property
    def size(self) -> int:
        return self.max_value + 1

    @property
    def alphabet(self) -> str:
        return letters(DIGITS[: max(10, self.source_base, self.target_base)], "*+=,: ", "base to is in")

    def task(self, number: int) -> Task:
        given, answer = in_base(number, self.source_base), in_base(number, self.target_base)
        steps = [] if self.source_base == 10 else _read(given, self.source_base)
        steps += [] if self.target_base == 10 else _written(number, self.target_base)
        return Task(
            id=f"conversion-{self.source_base}-{given}-{self.target_base}",
            text=f"base {self.source_base} {given} to base {self.target_base}: ",
            thinking=",".join(steps) or f"{given}={answer}",
            answer=answer,
            verifier="exact",
            payload={"answer": answer},
        )

    def content(self, number: int) -> str:
        return f"{number}:{self.source_base}:{self.target_base}"

    def corpus_line(self, number: int, draw: int) -> str:
        task = self.task(number)
        given = in_base(number, self.source_base)
        if draw % 2:
            return f"{given} in base {self.source_base} is {task.answer} in base {self.target_base}"
        return f"{given} is {task.answer}: {task.thinking}"

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work."""
        require_range(self.kind, "source_base", self.source_base, 2, 16)
        require_range(self.kind, "target_base", self.target_base, 2, 16)
        require_range(self.kind, "max_value", self.max_value, 1, 10**15)
        if self.source_base == self.target_base:
            raise ConfigError(
                f"conversion.source_base and conversion.target_base are both {self.source_base}.",
                "Choose two different bases.",
            )
