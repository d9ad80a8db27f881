"""Notices that the wall clock was set while a run plays.

Only timestamps depend on it: deadlines use monotonic clocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

LEAST_S = 1.0
"""Less is a clock that is being slewed, or two questions that were not asked at quite the same moment."""
_TOGETHER_S = 0.1


class WallClock:
    """Compares the wall clock with the monotonic one.

    Example: `clock = WallClock()`, and every few seconds `if moved_s := clock.moved_s(): ...`.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._ahead_s = wall() - monotonic()

    def moved_s(self) -> float:
        """By how many seconds it was set since the last question (forwards is positive), or 0."""
        before = self._monotonic()
        ahead_s = self._wall() - before
        if self._monotonic() - before > _TOGETHER_S:  # this process was held up between the two
            return 0.0
        moved_s, self._ahead_s = ahead_s - self._ahead_s, ahead_s
        return moved_s if abs(moved_s) >= LEAST_S else 0.0
