"""A rollout worker as the pool sees it: Ray or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treadle.actors.rollout.worker import WorkerStatus
from treadle.platform.errors import RolloutError
from treadle.platform.records import Drawn, Issue, Ref, WeightVersion


class WorkerDiedError(RolloutError):
    """The worker's process is gone; what it was drawing is drawn again elsewhere."""


class WorkerHandle(Protocol):
    """Calls raise `WorkerDiedError` when the worker's process is gone, else what the worker raised."""

    async def load(self, model_folder: str, version: WeightVersion) -> WeightVersion: ...

    async def draw(self, issue: Issue, min_version_step: int) -> tuple[Drawn, Ref, Ref]:
        """The summary, and references to the group and to the completions."""
        ...

    async def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]: ...

    async def status(self) -> WorkerStatus: ...

    async def where(self) -> str:
        """Where a worker that does not answer hangs, as far as can be found out within a few seconds."""
        ...

    def kill(self) -> None:
        """Ends the worker's process at once. Never fails."""
        ...


Launch: TypeAlias = Callable[[str, int], WorkerHandle]
"""Starts a worker of that name with so many slots; returns before it is ready."""
