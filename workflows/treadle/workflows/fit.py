"""Supervised fitting: the loop that pretraining, SFT and distillation share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from treadle.platform.records import StepBatch, StepReport
from treadle.workflows.journal import Journal
from treadle.workflows.roles import Roles


async def fit(
    roles: Roles,
    batches: Callable[[int], StepBatch],
    steps: int,
    journal: Journal,
    *,
    stop: Callable[[int], Awaitable[bool]] | None = None,
) -> AsyncIterator[StepReport]:
    """Yields a report per optimizer step, from the journal's position to `steps` or until `stop(step)` holds.

    `batches(step)` must give the same batch for the same step in every process; `stop` is asked before a step is
    made, so a resumed run asks again with the same weights and gets the same answer.
    """
    for step in range(journal.start, steps):
        if stop is not None and await stop(step):
            return
        batch = batches(step)
        with journal.clock("learn"):
            report = await roles.learner.step(batch)
        yield await journal.fitted(report)
