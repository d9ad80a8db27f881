"""The tasks of a generator that belong to one split."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from treadle.platform.errors import ConfigError, DataError
from treadle.workflows.data.generators.base import Generator, Task
from treadle.workflows.data.permutation import Epochs, Permutation
from treadle.workflows.data.split import SPLITS, in_split

MAX_TASKS = 65_536
"""Spaces larger than this are represented by this many of their tasks, the same ones in every run."""


@lru_cache(maxsize=16)
def split_numbers(generator: Generator, split: str, fraction: float, limit: int) -> NDArray[np.int64]:
    """Numbers of the pool's tasks in a split, ascending in pool order. Hashes every task once."""
    numbers: Sequence[int] = range(generator.size)
    if generator.size > limit:
        order = Permutation(generator.size, "pool")
        numbers = [order.at(i) for i in range(limit)]
    kept = [n for n in numbers if in_split(generator.content(n), split, fraction)]
    return np.array(kept, dtype=np.int64 if generator.size < 2**63 else object)


class TaskPool:
    """An endless order of a split's tasks; no task repeats within an epoch.

    Example: `TaskPool(Addition(), "heldout", 0.1, seed=7).at(0)` is the same task in every process. Train and
    held-out tasks are disjoint whatever the seeds, because membership is a hash of the task's content.
    Raises DataError when the split has no tasks.
    """

    def __init__(
        self, generator: Generator, split: str, fraction: float, seed: int, limit: int = MAX_TASKS
    ) -> None:
        require_split(split, fraction)
        self.generator = generator
        self._numbers = split_numbers(generator, split, fraction, limit)
        if len(self._numbers) == 0:
            raise DataError(
                f"The {split} part of {generator} has no tasks at heldout_fraction={fraction}.",
                "Change heldout_fraction, or choose a larger space of tasks.",
            )
        self._order = Epochs(len(self._numbers), "tasks", seed)

    def __len__(self) -> int:
        return len(self._numbers)

    def number_at(self, index: int) -> int:
        """The generator's number of the task at any index from 0 on."""
        return int(self._numbers[self._order.at(index)])

    def at(self, index: int) -> Task:
        """The task at any index from 0 on."""
        return self.generator.task(self.number_at(index))


def require_split(split: str, fraction: float) -> None:
    """Raises ConfigError for an unknown split or a fraction outside [0, 1)."""
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} is not one of {', '.join(SPLITS)}.", "Choose one of these.")
    if not 0 <= fraction < 1:
        raise ConfigError(f"heldout_fraction={fraction} is not in [0, 1).", "Hold out a part, such as 0.1.")
