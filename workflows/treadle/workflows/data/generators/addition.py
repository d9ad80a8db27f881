"""Addition of two numbers, with a chain that goes through the digit columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from treadle.platform.errors import ConfigError
from treadle.workflows.data.generators.base import Task, letters, numbered, require_range


def columns(a: int, b: int) -> str:
    """Units first, the carry written where there is one. Example: 47, 85 → `7+5=12,4+8+1=13`."""
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        steps.append(_fact(x, y, carry))
        carry = (x + y + carry) // 10
    return ",".join(steps)


def places(a: int, b: int) -> str:
    """Tens with tens, units with units, then together. Example: 47, 85 → `40+80=120,7+5=12,120+12=132`."""
    split = 10 ** (max(len(str(a)), len(str(b))) - 1)
    high, low = a // split * split + b // split * split, a % split + b % split
    parts = f"{a // split * split}+{b // split * split}={high},{a % split}+{b % split}={low}"
    return f"{parts},{high}+{low}={a + b}"


OPENINGS = ("=", ": ")
CLOSINGS = ("; ", " so ", " = ", ": ")
CHAINS: Mapping[str, Callable[[int, int], str]] = {"columns": columns, "places": places}


@dataclass(frozen=True, kw_only=True)
class Addition:
    """`47+85=` for all pairs of numbers with at most `digits` digits, one of them with two or more: sums of
    two single digits are the facts that chains and corpora are made of, and no task is one of them."""

    kind: str = "addition"
    digits: int = 2
    """Largest number of digits of an operand."""
    smallest: int = 0
    """Smallest operand. From 10^(digits-1) on, all chains have the same columns."""
    chain: str = "columns"
    """How the worked chain goes: columns or places."""
    facts: float = 0.1
    """Share of corpus lines that are facts of one column (`7+5+1=13`)."""
    worked: float = 0.9
    """Share of corpus lines that show a whole sum with its chain; the rest state sums only."""

    @property
    def size(self) -> int:
        spread = 10**self.digits - self.smallest
        return spread**2 - max(0, 10 - self.smallest) ** 2

    @property
    def alphabet(self) -> str:
        return letters("0123456789+=,", *OPENINGS, *CLOSINGS, "sum")

    def task(self, number: int) -> Task:
        a, b = self._operands(number)
        answer = str(a + b)
        return Task(
            id=f"addition-{a}+{b}",
            text=f"{a}+{b}=",
            thinking=CHAINS[self.chain](a, b),
            answer=answer,
            verifier="exact",
            payload={"answer": answer},
        )

    def content(self, number: int) -> str:
        a, b = self._operands(number)
        return f"{min(a, b)}+{max(a, b)}"

    def corpus_line(self, number: int, draw: int) -> str:
        share, rest = (draw & 0xFFFFFFFF) / 2**32, draw >> 32
        if share < self.facts:
            return _fact(*numbered(rest % 200, 10, 10, 2))
        a, b = self._operands(number)
        if share < self.facts + self.worked:
            # Varied separators: with one of them, a model learns to copy the answer behind that one only.
            opening, closing = numbered(rest % 8, len(OPENINGS), len(CLOSINGS))
            return f"{a}+{b}{OPENINGS[opening]}{CHAINS[self.chain](a, b)}{CLOSINGS[closing]}{a + b}"
        return f"sum {a} {b} = {a + b}"

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work."""
        require_range(self.kind, "digits", self.digits, 2, 18)
        require_range(self.kind, "smallest", self.smallest, 0, 10**self.digits - 2)
        if self.chain not in CHAINS:
            raise ConfigError(
                f"addition.chain={self.chain!r} is unknown.", f"Set it to one of: {', '.join(CHAINS)}."
            )
        if self.facts < 0 or self.worked < 0 or self.facts + self.worked > 1:
            raise ConfigError(
                f"addition.facts={self.facts} and addition.worked={self.worked} must be shares adding up to "
                "at most 1.",
                "Lower one of them.",
            )

    def _operands(self, number: int) -> list[int]:
        """Pairs from `smallest` on, without those of two single digits: first the pairs whose first operand is a
        single digit, then the others."""
        spread = 10**self.digits - self.smallest
        singles = max(0, 10 - self.smallest)
        short = singles * (spread - singles)
        if number < short:
            a, b = numbered(number, singles, spread - singles)
            return [a + self.smallest, b + singles + self.smallest]
        a, b = numbered(number - short, spread - singles, spread)
        return [a + singles + self.smallest, b + self.smallest]


def _fact(x: int, y: int, carry: int) -> str:
    return f"{x}+{y}" + (f"+{carry}" if carry else "") + f"={x + y + carry}"
