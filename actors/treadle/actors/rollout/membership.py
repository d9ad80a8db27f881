"""The workers of a pool: they start, die and are replaced, join and leave while others draw.

A worker that died, fell silent or whose engine failed is replaced within a budget. A replacement, and one that joins,
loads the model, is brought to the newest weights by `catch_up`, and only then draws. One that leaves draws nothing new,
finishes what it has or hands it back, and ends. Where the cluster has no place for a replacement the others go on
without it, and it comes back when there is one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from treadle.actors.replaced import Replaced, Told, tell_nobody
from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.handles import Launch, WorkerDiedError, WorkerHandle
from treadle.actors.rollout.slots import Slots
from treadle.actors.rollout.supervision import (
    Budget,
    Member,
    as_role_error,
    grown,
    heard,
    kernel_struck,
    verdict,
)
from treadle.actors.rollout.worker import WorkerStatus
from treadle.cluster.backoff import BackOffs
from treadle.platform.errors import DeadlineError, RoleError, RolloutError, TreadleError
from treadle.platform.memory import NODE_RAN_OUT, PHRASE, REMEDIES, STRUCK
from treadle.platform.records import WeightVersion

_log = logging.getLogger(__name__)
RETRY_S = 0.05
_LOOK_S = 1.0
_NO_PLACE_S = 3.0
"""A cluster needs moments to give a lost worker's place to its replacement."""

CatchUp: TypeAlias = Callable[[str, WorkerHandle], Awaitable[object]]
"""Brings a replaced worker (name, handle) to the newest published weights; raises when it cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resized:
    """What a change of the number of workers came to. `refused` says why, for those that could not join; `handed_back`
    are the draws that leavers did not finish, which others make under the same ids."""

    joined: Sequence[str] = ()
    left: Sequence[str] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    handed_back: Sequence[str] = ()


async def _always(_: str) -> bool:
    return True


async def _nobody(_: str) -> None:
    return


class Membership:
    """Keeps the workers; `RolloutPool` adds what they are for.

    `catch_up` and `forget` tell the weight coordinator who comes and goes. `placed` says whether the cluster has a
    place for a worker (by name), and `missing` hears of one that has none, and why it needs one. `back_offs` decides
    whether one that ran out of memory comes back with fewer slots; `slots.lowered` hears of it.
    """

    def __init__(
        self,
        config: RolloutConfig,
        launch: Launch,
        catch_up: CatchUp | None = None,
        back_offs: BackOffs | None = None,
    ) -> None:
        self.catch_up = catch_up
        self.forget: Callable[[str], Awaitable[None]] = _nobody
        self.placed: Callable[[str], Awaitable[bool]] = _always
        self.missing: Callable[[str, str], None] = lambda _name, _cause: None
        self.told: Told = tell_nobody
        self._config = config
        self._launch = launch
        self.slots = Slots(config, back_offs or BackOffs(0))
        self._budget = Budget(config)
        self._members: dict[str, Member] = {}
        self._model: tuple[str, WeightVersion] = ("", WeightVersion(step=0))
        self._failure: RolloutError | None = None
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._resizing = asyncio.Lock()

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
    def ready(self) -> int:
        """Workers that can draw and will stay."""
        return sum(member.ready and not member.leaving for member in self._members.values())

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

    async def resize(self, workers: int) -> Resized:
        """Goes on with so many workers: new ones join under the lowest free numbers, those with the highest leave.

        Returns when they have. One that cannot join is named in the answer; the run goes on without it.
        """
        async with self._resizing:
            self._refuse_if_failed()
            numbers = sorted(int(name.rpartition("-")[2]) for name in self._members)
            free = [number for number in range(len(numbers) + workers) if number not in numbers]
            joining = [f"rollout-{number}" for number in free[: max(0, workers - len(numbers))]]
            leaving = [self._members[f"rollout-{number}"] for number in numbers[workers:]]
            refusals = await asyncio.gather(*(self._join(name) for name in joining))
            kept = await asyncio.gather(*(self._leave(member) for member in leaving))
            refused = {name: why for name, why in zip(joining, refusals, strict=True) if why}
            return Resized(
                joined=[name for name in joining if name not in refused],
                left=[member.name for member in leaving],
                refused=refused,
                handed_back=[issue for issues in kept for issue in issues],
            )

    def close(self) -> None:
        """Ends all workers. Draws in flight fail."""
        self._failure = self._failure or RolloutError("rollout: the pool is closed.")
        for task in self._tasks:
            task.cancel()
        for member in self._members.values():
            member.give_up(self._failure)
        self._announce()

    async def _join(self, name: str) -> str:
        """Why the worker could not join, or nothing. It costs nothing of the replacements' budget."""
        try:
            member = self._add(name)
        except TreadleError as error:
            return error.message
        try:
            await self._prepare(member)
        except (TreadleError, TimeoutError) as error:
            cause = as_role_error(member, "join", error)
            await self._remove(member, cause)
            return cause.message
        self._make_ready(member)
        self._spawn(self._watch(member))
        return ""

    async def _leave(self, member: Member) -> Sequence[str]:
        """Waits until it has finished what it draws, or for `drain_deadline_s`. Returns what it has not finished."""
        member.leaving = True
        self._announce()
        until = time.monotonic() + self._config.drain_deadline_s
        while member.draws and not member.gone and time.monotonic() < until:
            await self._any_news()
        unfinished = sorted(member.asked)
        await self._remove(member, RolloutError(f"rollout: worker {member.name} was told to leave."))
        return unfinished

    async def _remove(self, member: Member, cause: RoleError) -> None:
        """The coordinator forgets it first: nothing is published to a process that ends."""
        if self._members.get(member.name) is member:
            with suppress(TreadleError):  # a coordinator that is gone has no memory of it either
                await self.forget(member.name)
            self._members.pop(member.name, None)
        member.give_up(cause)
        self._announce()

    def _replace(self, member: Member, cause: RoleError) -> None:
        """Gives a worker up and starts another under its name, unless it was leaving; once per incarnation."""
        if self._members.get(member.name) is not member or member.gone:
            return
        member.give_up(cause)
        if member.leaving:
            return
        _log.warning("rollout: replacing worker %s: %s", member.name, cause)
        try:
            self._budget.spend(member, cause)
        except RolloutError as error:
            self._fail(self._in_force(member, error))
            return
        found = grown(member, self._members.values()) if NODE_RAN_OUT in cause.message else None
        told = cause.message
        if PHRASE in told and found is None:
            told = self._with_fewer_slots(member, told)
        fresh = self._add(member.name)
        self._spawn(self._bring_back(fresh, told, member.status))
        if found is not None:
            self._replace(*found)

    def _with_fewer_slots(self, member: Member, cause: str) -> str:
        """The cause, and why the replacement of a worker that ran out of memory draws as many sequences at once as
        before, if it does."""
        known = [one for one in (member.status, *self.statuses.values()) if one is not None]
        why = self.slots.lower(member.name, known)
        return f"{cause}; {why}" if why else cause

    def _in_force(self, member: Member, error: RolloutError) -> RolloutError:
        """The error that ends the pool, with what the worker that failed last had, if memory is the cause."""
        if PHRASE not in error.message:
            return error
        node = (
            f" on node {member.status.node[:8]}" if member.status is not None and member.status.node else ""
        )
        had = f"worker {member.name}{node} failed last, with rollout.slots={self.slots.of(member.name)}"
        return RolloutError(f"{error.message}; {had}.", error.remedy)

    async def _bring_back(self, member: Member, cause: str, before: WorkerStatus | None) -> None:
        noticed_s = time.monotonic()
        try:
            await self._prepared(member, cause)
            explained = self._explained(member, cause, before)
            if explained != cause:
                cause = self._with_fewer_slots(member, explained)
            if member.slots > self.slots.of(member.name):  # it has told itself what its predecessor ended of
                member.give_up(
                    RolloutError(f"rollout: worker {member.name} gives way to one with fewer slots.")
                )
                member = self._add(member.name)
                await self._prepared(member, cause)
        except (TreadleError, TimeoutError) as error:
            self._replace(member, as_role_error(member, "start", error))
            return
        self._make_ready(member)
        seconds = time.monotonic() - noticed_s
        self.told(Replaced(role="rollout", name=member.name, cause=cause, seconds=seconds))
        await self._watch(member)

    def _explained(self, member: Member, cause: str, before: WorkerStatus | None) -> str:
        """The cause of a predecessor's end, and whether the kernel may have struck: only its node knows."""
        if PHRASE in cause or not kernel_struck(before, member.status):
            return cause
        self._budget.explain(member, f"{STRUCK}. {REMEDIES['rollout']}")
        return f"{cause}; {STRUCK}"

    async def _prepared(self, member: Member, cause: str) -> None:
        while not await self._prepared_in_place(member, cause):
            pass

    async def _prepared_in_place(self, member: Member, cause: str) -> bool:
        """Prepares it once it has a place. False where it loses that meanwhile: the cluster finds out later than the
        pool that a node has died."""
        await self._until_placed(member, cause)
        preparing = asyncio.ensure_future(self._prepare(member))
        losing = asyncio.ensure_future(self._until_displaced(member))
        try:
            await asyncio.wait({preparing, losing}, return_when=asyncio.FIRST_COMPLETED)
            if preparing.done():
                preparing.result()
            return preparing.done()
        finally:
            preparing.cancel()
            losing.cancel()
            await asyncio.gather(preparing, losing, return_exceptions=True)

    async def _until_displaced(self, member: Member) -> None:
        while member.gone or await self.placed(member.name):
            await asyncio.sleep(_LOOK_S)

    async def _until_placed(self, member: Member, cause: str) -> None:
        """consumes: what the cluster says; waits for: a place for the worker; unblocked by: one, or the worker's being
        given up; produces: one notice if there is none. It has no deadline: the others draw meanwhile, and where there
        are none a draw's own deadline ends the run."""
        noticed_s, told = time.monotonic(), False
        while not member.gone and not await self.placed(member.name):
            if not told and time.monotonic() - noticed_s > _NO_PLACE_S:
                self.missing(member.name, cause)
                told = True
            await asyncio.sleep(_LOOK_S)

    async def _prepare(self, member: Member) -> None:
        """Loads the model, and the newest weights; again where the model was switched meanwhile."""
        loaded: object = None
        while loaded is not self._model:
            loaded = self._model
            await self._load_current(member)
            if self.catch_up is not None:
                limit_s = 2 * self._config.stage_deadline_s
                await asyncio.wait_for(self.catch_up(member.name, member.handle), limit_s)

    def _make_ready(self, member: Member) -> None:
        member.ready = not member.gone
        self._announce()

    async def _load_current(self, member: Member) -> None:
        await self._bounded(member, member.handle.load(*self._model), "start")
        member.status = await self._bounded(member, member.handle.status(), "start")
        member.loaded = True

    async def _reload(self, member: Member) -> None:
        try:
            await self._bounded(member, member.handle.load(*self._model), "load")
        except (WorkerDiedError, DeadlineError) as error:
            self._replace(member, error)

    async def _bounded(self, member: Member, call: Coroutine[Any, Any, Any], phase: str) -> Any:
        limit_s = self._config.start_deadline_s
        try:
            return await asyncio.wait_for(member.call(call), limit_s)
        except TimeoutError as error:
            raise DeadlineError(
                f"rollout/{phase}: worker {member.name} did not answer within {limit_s:g} s; "
                f"{await member.handle.where()}.",
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
                reason = as_role_error(member, "heartbeat", error)
            if reason is not None and not member.gone:
                self._replace(member, reason)

    def _add(self, name: str) -> Member:
        slots = self.slots.of(name)
        member = Member(name, self._launch(name, slots), slots)
        self._members[name] = member
        return member

    async def _any_news(self) -> None:
        """Something about the workers has changed, or a moment has passed."""
        self._news.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), RETRY_S)

    def _fail(self, error: RolloutError) -> None:
        self._failure = self._failure or error
        self._announce()

    def _refuse_if_failed(self) -> None:
        if self._failure is not None:
            raise RolloutError(self._failure.message, self._failure.remedy)

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
