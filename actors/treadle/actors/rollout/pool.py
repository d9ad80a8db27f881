"""`contracts.Rollouts` and `contracts.Scorer` over workers that may die.

A draw goes to the worker with the fewest; a worker that died, fell silent or whose engine failed is replaced
within a budget, and what it was drawing is drawn again under the same ids by whoever is free: the same issue
gives the same samples. A replacement loads the model, is brought to the newest weights by `catch_up`, and
only then draws. A prompt in whose course workers end is drawn alone, and refused from then on if that ends one, too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from treadle.actors.replaced import Replaced, Told, tell_nobody
from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.engine_loop import EngineFailedError, WorkerBehindError
from treadle.actors.rollout.handles import Launch, WorkerDiedError, WorkerHandle
from treadle.actors.rollout.supervision import Budget, Member, grown, heard, kernel_struck, verdict
from treadle.actors.rollout.worker import WorkerStatus
from treadle.platform.errors import DeadlineError, PoisonedError, RoleError, RolloutError, TreadleError
from treadle.platform.memory import NODE_RAN_OUT, PHRASE, REMEDIES, STRUCK
from treadle.platform.records import Drawn, Issue, WeightVersion

_log = logging.getLogger(__name__)
_RETRY_S = 0.05
_SUSPECT_AFTER = 2
"""Workers that ended while they drew an issue, among others, before it is drawn alone."""

CatchUp: TypeAlias = Callable[[str, WorkerHandle], Awaitable[object]]
"""Brings a replaced worker (name, handle) to the newest published weights; raises when it cannot."""


class RolloutPool:
    """The driver's side of the rollout role.

    `max_lag_steps` is the staleness bound: a draw needs weights of at least `issue.version.step` minus it.
    Example: `pool = RolloutPool(config, ray_launch(config)); await pool.start(folder)`, later
    `pool.catch_up = lambda name, worker: broadcaster.catch_up(name, worker.actor)`.
    """

    def __init__(
        self, config: RolloutConfig, launch: Launch, catch_up: CatchUp | None = None, max_lag_steps: int = 0
    ) -> None:
        self.catch_up = catch_up
        self.told: Told = tell_nobody
        self.max_lag_steps = max_lag_steps
        self._config = config
        self._launch = launch
        self._budget = Budget(config)
        self._members: dict[str, Member] = {}
        self._model: tuple[str, WeightVersion] = ("", WeightVersion(step=0))
        self._failure: RolloutError | None = None
        self._poisoned: dict[str, PoisonedError] = {}
        self._leaving: Collection[str] = ()
        self._one_suspect = asyncio.Lock()
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def workers(self) -> Mapping[str, WorkerHandle]:
        """The living workers by name, those that are being started among them."""
        return {name: member.handle for name, member in self._members.items() if not member.gone}

    @property
    def loaded(self) -> Mapping[str, WorkerHandle]:
        """The workers that hold a model: what a new weight coordinator publishes to. The others catch up."""
        return {name: m.handle for name, m in self._members.items() if m.loaded and not m.gone}

    @property
    def statuses(self) -> Mapping[str, WorkerStatus]:
        """What each worker said last."""
        return {name: m.status for name, m in self._members.items() if m.status is not None}

    @property
    def all_ready(self) -> bool:
        """Whether every worker can draw: none is being replaced."""
        return all(member.ready for member in self._members.values())

    @property
    def restarts(self) -> int:
        """Workers replaced so far."""
        return self._budget.total

    async def start(self, model_folder: str, version: WeightVersion = WeightVersion(step=0)) -> None:
        """Starts all workers with a model. Raises `DeadlineError`, or what made a worker fail."""
        self._model = (model_folder, version)
        for index in range(self._config.workers):
            self._add(f"rollout-{index}")
        try:
            await asyncio.gather(*(self._load_current(member) for member in self._members.values()))
        except BaseException:
            self.close()
            raise
        for member in self._members.values():
            member.ready = True
            self._spawn(self._watch(member))

    async def load(self, model_folder: str, version: WeightVersion = WeightVersion(step=0)) -> None:
        """Switches every worker to another model; raises what `start` raises."""
        self._model = (model_folder, version)
        await asyncio.gather(*(self._reload(m) for m in list(self._members.values()) if m.ready))

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

    def close(self) -> None:
        """Ends all workers. Draws in flight fail."""
        self._failure = self._failure or RolloutError("rollout: the pool is closed.")
        for task in self._tasks:
            task.cancel()
        for member in self._members.values():
            member.give_up(self._failure)
        self._announce()

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
                ended += 1
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

    @staticmethod
    def _later(member: Member, error: WorkerBehindError, story: list[str]) -> None:
        member.retry_s = time.monotonic() + _RETRY_S
        story[1:] = [f"Refused before: {error.message}"]

    async def _chosen(self) -> Member:
        """The least loaded worker that may hold the right weights and will stay."""
        while True:
            self._refuse_if_failed()
            now = time.monotonic()
            able = [m for m in self._members.values() if m.ready and m.retry_s <= now and not m.reserved]
            if able:
                return min(able, key=lambda m: (m.is_on(self._leaving), m.draws))
            await self._any_news()

    async def _any_news(self) -> None:
        """Something about the workers has changed, or a moment has passed."""
        self._news.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), _RETRY_S)

    def _replace(self, member: Member, cause: RoleError) -> None:
        """Gives a worker up and starts another under its name; once per incarnation."""
        if self._members.get(member.name) is not member or member.gone:
            return
        member.give_up(cause)
        _log.warning("rollout: replacing worker %s: %s", member.name, cause)
        try:
            self._budget.spend(member, cause)
        except RolloutError as error:
            self._fail(error)
            return
        fresh = self._add(member.name)
        self._spawn(self._bring_back(fresh, cause.message, member.status))
        if NODE_RAN_OUT in cause.message and (found := grown(member, self._members.values())):
            self._replace(*found)

    async def _bring_back(self, member: Member, cause: str, before: WorkerStatus | None) -> None:
        noticed_s = time.monotonic()
        try:
            loaded: object = None
            while loaded is not self._model:  # it may be switched meanwhile
                loaded = self._model
                await self._load_current(member)
                cause = self._explained(member, cause, before)
                if self.catch_up is not None:
                    limit_s = 2 * self._config.stage_deadline_s
                    await asyncio.wait_for(self.catch_up(member.name, member.handle), limit_s)
        except (TreadleError, TimeoutError) as error:
            self._replace(member, _as_role_error(member, "start", error))
            return
        member.ready = True
        self._announce()
        seconds = time.monotonic() - noticed_s
        self.told(Replaced(role="rollout", name=member.name, cause=cause, seconds=seconds))
        await self._watch(member)

    def _explained(self, member: Member, cause: str, before: WorkerStatus | None) -> str:
        """The cause of a predecessor's end, and whether the kernel may have struck: only its node knows."""
        if PHRASE in cause or not kernel_struck(before, member.status):
            return cause
        self._budget.explain(member, f"{STRUCK}. {REMEDIES['rollout']}")
        return f"{cause}; {STRUCK}"

    async def _load_current(self, member: Member) -> None:
        await self._bounded(member, member.handle.load(*self._model), "start")
        member.status = await self._bounded(member, member.handle.status(), "start")
        member.loaded = True

    async def _reload(self, member: Member) -> None:
        try:
            await self._bounded(member, member.handle.load(*self._model), "load")
        except (WorkerDiedError, DeadlineError) as error:
            self._replace(member, error)

    async def _scored(
        self, member: Member, sequences: Sequence[NDArray[np.int32]]
    ) -> NDArray[np.float32] | None:
        try:
            return await self._bounded(member, member.handle.logprobs(sequences), "logprobs")
        except (WorkerDiedError, EngineFailedError, DeadlineError) as error:
            self._replace(member, error)
            return None

    async def _bounded(self, member: Member, call: Coroutine[Any, Any, Any], phase: str) -> Any:
        limit_s = self._config.start_deadline_s
        try:
            return await asyncio.wait_for(member.call(call), limit_s)
        except TimeoutError as error:
            raise DeadlineError(
                f"rollout/{phase}: worker {member.name} did not answer within {limit_s:g} s.",
                "Raise rollout.start_deadline_s, or see whether the cluster has room for the worker.",
            ) from error

    async def _watch(self, member: Member) -> None:
        """consumes: statuses; waits for: the next heartbeat; unblocked by: the worker's end; produces: a
        replacement when the worker died, fell silent or failed."""
        while not member.gone:
            await asyncio.sleep(self._config.heartbeat_s)
            try:
                member.status = await heard(member, self._config)
                reason = verdict(member.status, self._config)
            except TreadleError as error:
                reason = _as_role_error(member, "heartbeat", error)
            if reason is not None and not member.gone:
                self._replace(member, reason)

    def _add(self, name: str) -> Member:
        member = Member(name, self._launch(name))
        self._members[name] = member
        return member

    def _fail(self, error: RolloutError) -> None:
        self._failure = self._failure or error
        self._announce()

    def _refuse_if_failed(self) -> None:
        if self._failure is not None:
            raise RolloutError(self._failure.message, self._failure.remedy)

    def _refuse_if_poisoned(self, issue: Issue) -> None:
        if known := self._poisoned.get(issue.prompt.id):
            raise PoisonedError(known.message, known.remedy)

    def _announce(self) -> None:
        self._news.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._fail(RolloutError(f"rollout: supervision ended: {task.exception()!r}"))


def _as_role_error(member: Member, phase: str, error: BaseException) -> RoleError:
    if isinstance(error, RoleError):
        return error
    what = "did not answer in time" if isinstance(error, TimeoutError) else str(error)
    return RolloutError(f"rollout/{phase}: worker {member.name} {what}")
