"""What a role says when it has replaced one of its processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """A process that died, hung or lied, and its successor, which works now.

    `seconds` run from the moment the failure was noticed until the successor could take work.
    """

    role: str
    """rollout, verify or coordinator."""
    name: str
    cause: str
    seconds: float


Told: TypeAlias = Callable[[Replaced], None]


def tell_nobody(_: Replaced) -> None:
    """For pools that nobody watches."""
