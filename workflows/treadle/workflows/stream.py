"""The stream of scored groups, bounded by the staleness η.

One class serves every degree of asynchrony. η=0 draws a step's groups with exactly the weights the step
updates; η=1 draws the next step's while the learner works; η=k lets the engines run k versions ahead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from treadle.platform.contracts import Prompts, Rollouts, Verifiers
from treadle.platform.errors import DeadlineError, PoisonedError, RolloutError
from treadle.platform.objectives.base import ScoredGroup
from treadle.platform.records import Drawn, Issue, Sampling, Verdict, VerdictStatus, WeightVersion
from treadle.workflows.rewards import RewardRule


class GroupBook(Protocol):
    """What the stream writes down of every group: the ledger of one stage."""

    def issued(self, issue: Issue) -> None: ...

    def drawn(self, drawn: Drawn) -> None: ...

    def scored(self, drawn: Drawn, verdicts: Sequence[Verdict]) -> None: ...

    def dropped(self, ids: Sequence[str], reason: str) -> None: ...

    def quarantined(self, issue: Issue, cause: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A group that is drawn and judged. `outcome.rewards` is NaN where a sample was not scored."""

    index: int
    drawn: Drawn
    verdicts: tuple[Verdict, ...]
    outcome: ScoredGroup


class GroupStream:
    """Issues prompts in order and hands out batches of scored groups.

    consumes: prompts by index, published versions through `advance`;
    waits for: a published version at most η steps behind the step being prepared, draws and verdicts;
    unblocked by: `advance`, a finished draw, a finished judgement, or its deadline;
    produces: for step t, `per_step` groups whose oldest token was drawn with version ≥ t-η, in issue order;
    nothing is issued for steps from `steps` on.

    Groups that cannot be trained are dropped with a reason, written down, and replaced by a later prompt:
    "unscored" (fewer than two scored samples, or none without a group baseline), "zero_variance" (dynamic
    sampling only), "poisoned" (the prompt ends workers) and "stale" (older than η).
    """

    def __init__(
        self,
        *,
        stage: str,
        prompts: Prompts,
        rollouts: Rollouts,
        verifiers: Verifiers,
        book: GroupBook,
        sampling: Sampling,
        per_step: int,
        steps: int,
        staleness: int,
        version: WeightVersion,
        pending: Sequence[int] = (),
        cursor: int = 0,
        drop_zero_variance: bool = False,
        min_scored: int = 1,
        max_draw_factor: int = 8,
        take_deadline_s: float = 600.0,
        rewards: RewardRule | None = None,
    ) -> None:
        self._stage, self._prompts, self._rollouts, self._verifiers = stage, prompts, rollouts, verifiers
        self._book, self._sampling, self._per_step = book, sampling, per_step
        self._steps, self._staleness, self._version = steps, staleness, version
        self._backlog, self._cursor = list(pending), cursor
        self._drop_zero_variance, self._min_scored = drop_zero_variance, min_scored
        self._max_draw_factor, self._take_deadline_s = max_draw_factor, take_deadline_s
        self._rewards = rewards or RewardRule()
        self._next_step = version.step
        self._tasks: dict[int, asyncio.Task[Ready | None]] = {}
        self._ready: dict[int, Ready] = {}
        self._replaced = 0
        self._news = asyncio.Event()
        self.dropped: dict[str, int] = {}

    @property
    def cursor(self) -> int:
        """Index of the next prompt never issued so far; part of the checkpoint."""
        return self._cursor

    def advance(self, version: WeightVersion) -> None:
        """New weights are out: groups for later steps may be issued."""
        self._version = version
        self._fill()

    async def take(self, step: int) -> list[Ready]:
        """The batch of `step`. Raises the first error of a draw or a judgement, or `DeadlineError`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._take_deadline_s
        self._replaced = 0
        while True:
            self._news.clear()
            self._collect(step)
            if batch := self._batch(step):
                break
            self._fill()
            try:
                await asyncio.wait_for(self._news.wait(), deadline - loop.time())
            except TimeoutError:
                raise self._late(step) from None
        for ready in batch:
            del self._ready[ready.index]
        self._next_step = step + 1
        self._fill()
        return batch

    async def close(self) -> None:
        """Cancels what is in flight. Its groups stay issued in the ledger and are drawn again on resume."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()

    def _batch(self, step: int) -> list[Ready]:
        self._drop_stale(step)
        if len(self._ready) < self._per_step or (self._staleness == 0 and self._tasks):
            return []
        chosen = list(self._ready.values())[: self._per_step]  # completion order; all of them when η=0
        return sorted(chosen, key=lambda ready: ready.index)

    def _drop_stale(self, step: int) -> None:
        stale = [i for i, r in self._ready.items() if step - r.drawn.oldest.step > self._staleness]
        if stale:
            self._drop([self._ready.pop(index).drawn.id for index in stale], "stale")

    def _capacity(self) -> int:
        last_step = min(self._version.step + self._staleness, self._steps - 1)
        return max(0, last_step - self._next_step + 1) * self._per_step

    def _fill(self) -> None:
        while len(self._tasks) + len(self._ready) < self._capacity():
            index = self._next_index()
            issue = Issue(
                id=f"{self._stage}/{index:08d}",
                prompt=self._prompts.at(index),
                sampling=self._sampling,
                version=self._version,
            )
            self._book.issued(issue)
            task = asyncio.create_task(self._produce(index, issue), name=issue.id)
            task.add_done_callback(lambda _: self._news.set())
            self._tasks[index] = task

    def _next_index(self) -> int:
        if self._backlog:
            return self._backlog.pop(0)
        self._cursor += 1
        return self._cursor - 1

    async def _produce(self, index: int, issue: Issue) -> Ready | None:
        try:
            drawn = await self._rollouts.draw(issue)
        except PoisonedError as error:
            self._book.quarantined(issue, error.message)
            self._drop([issue.id], "poisoned")
            return None
        self._book.drawn(drawn)
        verdicts = self._rewards.weighed(drawn, await self._verifiers.judge(drawn))
        self._book.scored(drawn, verdicts)
        outcome = self._rewards.outcome(drawn, verdicts, self._sampling.max_new_tokens)
        if outcome.scored.sum() < self._min_scored:
            self._drop([drawn.id], "unscored")
            return None
        if self._drop_zero_variance and not outcome.informative:
            self._drop([drawn.id], "zero_variance")
            return None
        return Ready(index=index, drawn=drawn, verdicts=verdicts, outcome=outcome)

    def _collect(self, step: int) -> None:
        for index in [i for i, task in self._tasks.items() if task.done()]:
            ready = self._tasks.pop(index).result()
            if ready is not None:
                self._ready[index] = ready
        if self._replaced > self._max_draw_factor * self._per_step:
            raise RolloutError(
                f"rollout/take: step {step} of stage {self._stage} dropped {self._replaced} groups "
                f"({self._reasons()}) and still lacks {self._per_step - len(self._ready)} of {self._per_step}.",
                "Choose prompts the policy sometimes solves, check the verifier, or turn dynamic_sampling off.",
            )

    def _drop(self, ids: Sequence[str], reason: str) -> None:
        self._book.dropped(ids, reason)
        self._replaced += len(ids)
        self.dropped[reason] = self.dropped.get(reason, 0) + len(ids)

    def _reasons(self) -> str:
        return ", ".join(f"{reason} {count}" for reason, count in sorted(self.dropped.items()))

    def _late(self, step: int) -> DeadlineError:
        waiting = [task.get_name() for task in self._tasks.values() if not task.done()]
        return DeadlineError(
            f"rollout/take: step {step} of stage {self._stage} has {len(self._ready)} of {self._per_step} groups "
            f"after {self._take_deadline_s:.0f} s; waiting for {', '.join(waiting[:5]) or 'nothing'}"
            f"{' …' if len(waiting) > 5 else ''}.",
            "Raise the stage's take_deadline_s, or look at the rollout and verifier logs of these groups.",
        )


def verdict_counts(batch: Sequence[Ready]) -> dict[VerdictStatus, int]:
    """How many samples of a batch ended in each status."""
    counts = dict.fromkeys(VerdictStatus, 0)
    for verdict in _verdicts(batch):
        counts[verdict.status] += 1
    return counts


def _verdicts(batch: Sequence[Ready]) -> Iterator[Verdict]:
    for ready in batch:
        yield from ready.verdicts
