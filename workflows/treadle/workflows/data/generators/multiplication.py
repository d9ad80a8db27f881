"""Multiplication of numbers with several digits, worked by partial products."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.workflows.data.generators.base import Task, letters, numbered, require_range


def partial_products(a: int, b: int) -> str:
    """One product per digit of b, units first, added up as they come.

    Example: 12, 34 → `12*4=48,12*30=360,48+360=408`.
    """
    total, steps = 0, []
    for place, digit in enumerate(reversed(str(b))):
        factor = int(digit) * 10**place
        steps.append(f"{a}*{factor}={a * factor}")
        if place:
            steps.append(f"{total}+{a * factor}={total + a * factor}")
        total += a * factor
    return ",".join(steps)


@dataclass(frozen=True, kw_only=True)
class Multiplication:
    """`12*34=` for all pairs of numbers with at most these many digits."""

    kind: str = "multiplication"
    digits: int = 2
    """Largest number of digits of the first factor."""
    other_digits: int = 2
    """Largest number of digits of the second factor."""

    @property
    def size(self) -> int:
        return 10 ** (self.digits + self.other_digits)

    @property
    def alphabet(self) -> str:
        return letters("0123456789*+=,:; ", "times is")

    def task(self, number: int) -> Task:
        a, b = numbered(number, 10**self.digits, 10**self.other_digits)
        return Task(
            id=f"multiplication-{a}*{b}",
            text=f"{a}*{b}=",
            thinking=partial_products(a, b),
            answer=str(a * b),
            verifier="exact",
            payload={"answer": str(a * b)},
        )

    def content(self, number: int) -> str:
        a, b = numbered(number, 10**self.digits, 10**self.other_digits)
        return f"{min(a, b)}*{max(a, b)}"

    def corpus_line(self, number: int, draw: int) -> str:
        a, b = numbered(number, 10**self.digits, 10**self.other_digits)
        if draw % 2:
            return f"{a}*{b}: {partial_products(a, b)}; {a * b}"
        return f"{a} times {b} is {a * b}"

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work."""
        require_range(self.kind, "digits", self.digits, 1, 12)
        require_range(self.kind, "other_digits", self.other_digits, 1, 12)
