"""What a generator is: a numbered space of tasks, each with its answer and a worked chain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from treadle.platform.errors import ConfigError
from treadle.platform.records import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task and how a careful solver answers it.

    Example: `Task(id="addition-47+85", text="47+85=", thinking="7+5=12,4+8+1=13", answer="132",
    verifier="exact", payload={"answer": "132"})`. The policy sees `text`, never the rest.
    """

    id: str
    text: str
    thinking: str
    answer: str
    verifier: str
    payload: Mapping[str, Json]

    @property
    def completion(self) -> str:
        """The worked chain in R1's form, as cold-start data."""
        return f"<think>{self.thinking}</think><answer>{self.answer}</answer>"


@runtime_checkable
class Generator(Protocol):
    """A frozen dataclass whose fields choose the space. Numbers and tasks are one to one, and all tasks of a
    generator go to the same verifier."""

    def __hash__(self) -> int: ...

    @property
    def size(self) -> int:
        """Distinct tasks."""
        ...

    @property
    def alphabet(self) -> str:
        """Every character of its prompts, chains, answers and corpus lines, each once."""
        ...

    def task(self, number: int) -> Task:
        """The task with a number in [0, size)."""
        ...

    def content(self, number: int) -> str:
        """What the task is about, in one spelling: tasks of equal content (47+85 and 85+47) fall into the
        same split. Cheap, since it is asked of every task of the space."""
        ...

    def corpus_line(self, number: int, draw: int) -> str:
        """A line about the task in other words than prompt and chain, for pretraining. `draw` (64 random
        bits) chooses the wording."""
        ...


def numbered(number: int, *radices: int) -> list[int]:
    """The digits of a number in mixed radix, last radix fastest. Example: `numbered(7, 3, 4)` is [1, 3]."""
    digits = []
    for radix in reversed(radices):
        number, digit = divmod(number, radix)
        digits.append(digit)
    return digits[::-1]


def letters(*texts: str) -> str:
    """The distinct characters of the texts, sorted."""
    return "".join(sorted(set("".join(texts))))


def require_range(kind: str, setting: str, value: int, low: int, high: int) -> None:
    """Raises ConfigError when a setting is outside [low, high]."""
    if not low <= value <= high:
        raise ConfigError(
            f"{kind}.{setting}={value} is outside {low} … {high}.", f"Choose {setting} within these bounds."
        )
