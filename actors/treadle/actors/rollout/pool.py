"""`contracts.Rollouts` and `contracts.Scorer` over workers that may die.

A draw goes to the worker with the fewest. What a worker was drawing that is replaced, or leaves, is drawn again under
the same ids by whoever is free: the same issue gives the same samples. A prompt in whose course workers end is drawn
alone, and refused from then on if that ends one, too. Who the workers are: `membership.py`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.engine_loop import EngineFailedError, WorkerBehindError
from treadle.actors.rollout.handles import Launch, WorkerDiedError
from treadle.actors.rollout.membership import RETRY_S, CatchUp, Membership
from treadle.actors.rollout.supervision import Member
from treadle.cluster.backoff import BackOffs
from treadle.platform.errors import DeadlineError, PoisonedError, RolloutError
from treadle.platform.records import Drawn, Issue

_SUSPECT_AFTER = 2
"""Workers that ended while they drew an issue, among others, before it is drawn alone."""


class RolloutPool(Membership):
    """The driver's side of the rollout role.

    `max_lag_steps` is the staleness bound: a draw needs weights of at least `issue.version.step` minus it.
    Example: `pool = RolloutPool(config, ray_launch(config)); await pool.start(folder)`, later
    `pool.catch_up = lambda name, worker: broadcaster.catch_up(name, worker.actor)`.
    """

    def __init__(
        self,
        config: RolloutConfig,
        launch: Launch,
        catch_up: CatchUp | None = None,
        max_lag_steps: int = 0,
        back_offs: BackOffs | None = None,
    ) -> None:
        super().__init__(config, launch, catch_up, back_offs)
        self.max_lag_steps = max_lag_steps
        self._poisoned: dict[str, PoisonedError] = {}
        self._leaving: Collection[str] = ()
        self._one_suspect = asyncio.Lock()

    async def draw(self, issue: Issue) -> Drawn:
        """See `contracts.Rollouts`. Raises `DataError` for a prompt that cannot fit, `PoisonedError` for one that ends
        workers, `DeadlineError`, and `RolloutError` naming the first cause when workers fail more often than allowed.
        """
        story: list[str] = []
        try:
            async with asyncio.timeout(self._config.draw_deadline_s) as limit:
                return await self._draw(issue, story)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineError(
                f"rollout/draw: {issue.id} (prompt {issue.prompt.id}, version {issue.version.step}) was not drawn "
                f"within {self._config.draw_deadline_s:g} s; {' '.join(story) or 'no worker was ready.'}",
                "Raise rollout.draw_deadline_s, or look at the worker's log.",
            ) from error

    async def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> Mapping[str, NDArray[np.float32]]:
        """See `contracts.Scorer`; a worker that dies meanwhile is left out."""
        self._refuse_if_failed()
        members = [m for m in self._members.values() if m.ready]
        answers = await asyncio.gather(*(self._scored(m, sequences) for m in members))
        found = {m.name: a for m, a in zip(members, answers, strict=True) if a is not None}
        if not found:
            raise RolloutError("rollout/logprobs: no worker answered.", "See the workers' logs.")
        return found

    def avoid(self, nodes: Collection[str]) -> None:
        """From now on draws go to workers on other nodes, as long as there are any: these nodes will soon be gone."""
        self._leaving = frozenset(nodes)

    async def _draw(self, issue: Issue, story: list[str]) -> Drawn:
        """`story` says where the issue is, and why the last worker refused it."""
        ended = 0
        while ended < _SUSPECT_AFTER:
            self._refuse_if_poisoned(issue)
            member = await self._chosen()
            try:
                return await self._draw_on(member, issue, story)
            except WorkerBehindError as error:
                self._later(member, error, story)
            except (WorkerDiedError, EngineFailedError) as error:
                self._replace(member, error)
                ended += self._may_be_the_prompt(member)
        async with self._one_suspect:
            return await self._draw_alone(issue, story)

    async def _draw_alone(self, issue: Issue, story: list[str]) -> Drawn:
        """On a worker with nothing else in flight: if that one ends as well, it is the prompt."""
        while True:
            self._refuse_if_failed()
            self._refuse_if_poisoned(issue)
            member = await self._chosen()
            member.reserved = True
            try:
                while member.draws and not member.gone:
                    await self._any_news()
                return await self._draw_on(member, issue, story)
            except WorkerBehindError as error:
                self._later(member, error, story)
            except (WorkerDiedError, EngineFailedError) as error:
                self._replace(member, error)
                if not self._may_be_the_prompt(member):
                    continue
                self._poisoned[issue.prompt.id] = PoisonedError(
                    f"rollout/draw: prompt {issue.prompt.id} ended {_SUSPECT_AFTER + 1} workers, the last one while "
                    f"nothing else was drawn there: {error.message}",
                    "Take the prompt out of the data, or find out what it does to the engine.",
                )
            finally:
                member.reserved = False
                self._announce()

    async def _draw_on(self, member: Member, issue: Issue, story: list[str]) -> Drawn:
        story[:1] = [f"it is in flight on {member.name}."]
        member.draws += 1
        member.asked.add(issue.id)
        try:
            least = issue.version.step - self.max_lag_steps
            summary, group, texts = await member.call(member.handle.draw(issue, least))
            return dataclasses.replace(summary, group=group, texts=texts)
        finally:
            member.draws -= 1
            member.asked.discard(issue.id)
            self._announce()

    def _may_be_the_prompt(self, member: Member) -> bool:
        """Whether a worker's end counts against what it drew: not where it was to leave, or had more slots than its
        node has memory for."""
        return not member.leaving and member.slots <= self.slots.of(member.name)

    @staticmethod
    def _later(member: Member, error: WorkerBehindError, story: list[str]) -> None:
        member.retry_s = time.monotonic() + RETRY_S
        story[1:] = [f"Refused before: {error.message}"]

    async def _chosen(self) -> Member:
        """The least loaded worker that may hold the right weights and will stay."""
        while True:
            self._refuse_if_failed()
            now = time.monotonic()
            able = [m for m in self._members.values() if m.able(now)]
            if able:
                return min(able, key=lambda m: (m.is_on(self._leaving), m.draws))
            await self._any_news()

    async def _scored(
        self, member: Member, sequences: Sequence[NDArray[np.int32]]
    ) -> NDArray[np.float32] | None:
        try:
            return await self._bounded(member, member.handle.logprobs(sequences), "logprobs")
        except (WorkerDiedError, EngineFailedError, DeadlineError) as error:
            self._replace(member, error)
            return None

    def _refuse_if_poisoned(self, issue: Issue) -> None:
        if known := self._poisoned.get(issue.prompt.id):
            raise PoisonedError(known.message, known.remedy)
