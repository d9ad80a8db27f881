"""One worker under supervision, and the budget for replacing workers."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection, Coroutine
from typing import Any, TypeVar

from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.handles import WorkerDiedError, WorkerHandle
from treadle.actors.rollout.worker import WorkerStatus
from treadle.platform.errors import RoleError, RolloutError
from treadle.platform.memory import NODE_RAN_OUT, REMEDIES, remedy

T = TypeVar("T")
_GROWN = 2
"""Workers of a pool do the same, and hold about the same."""
_LAST_S = 3.0
"""As long as `where` may take."""


class Member:
    """A worker's incarnation as the pool sees it. A replacement is a new member under the same name."""

    def __init__(self, name: str, handle: WorkerHandle, slots: int) -> None:
        self.name = name
        self.handle = handle
        self.slots = slots
        self.loaded = False  # holds a model, perhaps of old weights
        self.ready = False
        self.draws = 0
        self.asked: set[str] = set()  # issues
        self.leaving = False  # it draws nothing new, and is not replaced
        self.reserved = False  # for a draw that is suspected of ending workers
        self.retry_s = 0.0  # monotonic; before it the worker is known to hold weights too old
        self.status: WorkerStatus | None = None
        self._gone: asyncio.Future[RoleError] = asyncio.get_running_loop().create_future()

    def is_on(self, nodes: Collection[str]) -> bool:
        """Whether it has said that it is on one of them."""
        return self.status is not None and self.status.node in nodes

    def able(self, now_s: float) -> bool:
        """Whether it may be given a draw."""
        return self.ready and not self.leaving and not self.reserved and self.retry_s <= now_s

    @property
    def gone(self) -> bool:
        return self._gone.done()

    def give_up(self, cause: RoleError) -> None:
        """Ends the process; calls in flight raise `WorkerDiedError` now, even if a frozen process never
        answers."""
        if not self.gone:
            self.ready = False
            self._gone.set_result(cause)
            self.handle.kill()

    async def call(self, call: Coroutine[Any, Any, T]) -> T:
        """The call's result, unless the worker is given up first."""
        task = asyncio.ensure_future(call)
        waited: set[asyncio.Future[Any]] = {task, self._gone}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
        if task.done() and not task.cancelled():
            return task.result()
        raise WorkerDiedError(f"rollout: worker {self.name} was given up: {self._gone.result()}")


class Budget:
    """How many replacements are allowed within a window, and what started it."""

    def __init__(self, config: RolloutConfig) -> None:
        self._limit = config.max_restarts
        self._window_s = config.restart_window_s
        self._spent: deque[tuple[float, str]] = deque()
        self.total = 0

    def spend(self, member: Member, cause: RoleError) -> None:
        """Raises `RolloutError` naming the first cause when the budget is spent."""
        now = time.monotonic()
        while self._spent and now - self._spent[0][0] > self._window_s:
            self._spent.popleft()
        self._spent.append((now, f"worker {member.name}: {cause.message}"))
        if len(self._spent) > self._limit:
            raise RolloutError(
                f"rollout: {len(self._spent)} workers failed within {self._window_s:g} s; "
                f"first cause: {self._spent[0][1]}",
                f"Remove the first cause; rollout.max_restarts={self._limit} allows no more replacements. "
                f"{cause.remedy}".strip(),
            )
        self.total += 1

    def explain(self, member: Member, more: str) -> None:
        """Adds to the cause of the member's last failure what was found out since."""
        of = f"worker {member.name}: "
        for at in range(len(self._spent) - 1, -1, -1):
            since_s, cause = self._spent[at]
            if cause.startswith(of):
                self._spent[at] = (since_s, f"{cause}; {more}")
                return


def verdict(status: WorkerStatus, config: RolloutConfig) -> RoleError | None:
    """Why a worker that answers must still be replaced, or None."""
    if status.failure:
        return RolloutError(
            f"rollout: the engine of worker {status.name} failed: {status.failure}",
            remedy("rollout", status.failure),
        )
    fetch_limit_s = (
        2 * config.stage_deadline_s
    )  # the fetch has its own deadline: this is for what that does not see
    if status.fetching_s > fetch_limit_s:
        return RolloutError(
            f"rollout/stage: worker {status.name} has been fetching weights for {status.fetching_s:.0f} s: "
            f"{status.where}.",
            f"Look at its node and log; twice rollout.stage_deadline_s={config.stage_deadline_s:g} is allowed.",
        )
    limits = {"loading": config.start_deadline_s, "adopting": config.stage_deadline_s}
    limit_s = max(limits.get(status.phase, 0.0), config.silence_deadline_s)
    if status.silent_s > limit_s:
        return RolloutError(
            f"rollout/{status.phase}: worker {status.name} made no progress for {status.silent_s:.0f} s "
            f"with {status.in_flight} issues in flight{f': {status.where}' if status.where else ''}.",
            "Raise rollout.silence_deadline_s if single steps take this long.",
        )
    return None


def kernel_struck(before: WorkerStatus | None, after: WorkerStatus | None) -> bool:
    """Whether the kernel has ended a process for want of memory on the node of a worker and its successor."""
    if before is None or after is None or before.node != after.node:
        return False
    return after.kernel_kills > before.kernel_kills


def grown(ended: Member, neighbours: Collection[Member]) -> tuple[Member, RoleError] | None:
    """The neighbour that holds far more memory than a worker did whose node ran out of it, and why it must be replaced:
    Ray ends what was started last, which need not be what has grown."""
    if ended.status is None or not _resident(ended):
        return None
    there = [m for m in neighbours if m.ready and m.status is not None and m.status.node == ended.status.node]
    heaviest = max(there, key=_resident, default=None)
    if heaviest is None or _resident(heaviest) <= _GROWN * _resident(ended):
        return None
    return heaviest, RolloutError(
        f"rollout/memory: worker {heaviest.name} holds {_resident(heaviest) / 2**30:.1f} GiB, far more than worker "
        f"{ended.name} did, which was ended because {NODE_RAN_OUT}.",
        REMEDIES["rollout"],
    )


def _resident(member: Member) -> int:
    return member.status.resident_bytes if member.status is not None else 0


async def heard(member: Member, config: RolloutConfig) -> WorkerStatus:
    """The worker's answer to a heartbeat. Raises what the call raises, and `RolloutError` for one that is silent.

    Where it hangs is asked for in the last seconds before its deadline, so that the answer holds up nobody.
    """
    asked = asyncio.ensure_future(member.call(member.handle.status()))
    where: asyncio.Future[str] | None = None
    try:
        last_s = min(_LAST_S, 0.75 * config.silence_deadline_s)
        done, _ = await asyncio.wait({asked}, timeout=config.silence_deadline_s - last_s)
        if not done:
            where = asyncio.ensure_future(member.handle.where())
            done, _ = await asyncio.wait({asked}, timeout=last_s)
        if not done and where is not None:
            raise _silence(member, config, await where)
        return asked.result()
    finally:
        asked.cancel()
        if where is not None:
            where.cancel()


def _silence(member: Member, config: RolloutConfig, where: str) -> RoleError:
    """Why a worker that did not answer a heartbeat is replaced."""
    before = member.status.phase if member.status is not None else "starting"
    asked = ", ".join(sorted(member.asked)[:5])
    return RolloutError(
        f"rollout/heartbeat: worker {member.name} has been silent for {config.silence_deadline_s:g} s; before, it was "
        f"{before}{f', asked to draw {asked}' if asked else ''}; {where}.",
        "Look at that worker's node and log; rollout.silence_deadline_s allows longer silences.",
    )


def as_role_error(member: Member, phase: str, error: BaseException) -> RoleError:
    """What went wrong with a worker in a phase, as an error of its role."""
    if isinstance(error, RoleError):
        return error
    what = "did not answer in time" if isinstance(error, TimeoutError) else str(error)
    return RolloutError(f"rollout/{phase}: worker {member.name} {what}")
