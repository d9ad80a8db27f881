"""The verifier pool as the workflows see it: `Verifiers` over one or more verify actors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from treadle.actors.replaced import Replaced, Told, tell_nobody
from treadle.actors.verify.asked import JudgeRequest, judge_request
from treadle.actors.verify.config import VerifyConfig
from treadle.actors.verify.verdicts import VerdictCounter, VerifyStats, unscored
from treadle.platform.errors import RoleError, VerifierError
from treadle.platform.records import Drawn, Ref, Verdict, VerdictStatus

_LOG = logging.getLogger(__name__)
PING_DEADLINE_S = 5.0
"""An actor that lives answers a ping at once: its event loop never waits for a verifier."""

_LOOK_S = 1.0
_NO_PLACE_S = 3.0
"""A cluster needs moments to give a lost actor's place to its replacement."""


class ActorLostError(VerifierError):
    """The verify actor is gone, or does not answer; says nothing about what it was judging."""


class VerifyHandle(Protocol):
    """One verify actor. `judge`, `ping` and `resize` raise `ActorLostError` when it is gone, `where` never raises."""

    async def judge(self, request: JudgeRequest, texts: Ref) -> tuple[Verdict, ...]: ...

    async def ping(self) -> None: ...

    async def resize(self, processes: int) -> None: ...

    async def where(self) -> str:
        """Where an actor that does not answer hangs, as far as can be found out within a few seconds."""
        ...

    def kill(self) -> None: ...


Spawn: TypeAlias = Callable[[int], Awaitable[VerifyHandle]]
"""Starts the verify actor of an index below `VerifyConfig.actors` and waits until it can judge."""


@dataclass(slots=True)
class _Slot:
    index: int
    handle: VerifyHandle | None
    load: int = 0
    asked: set[str] = field(default_factory=set)
    """Groups that it is judging."""
    probe: asyncio.Task[None] | None = None
    replacing: asyncio.Task[None] | None = None


class VerifierPool:
    """Sends each group to the least loaded actor and replaces actors that die; where the cluster has no place for a
    replacement (`placed` says so, `missing` hears of it), the others go on until there is one.

    consumes: drawn groups; waits for: an actor's answer, at most `judge_deadline_s`; unblocked by: the
    answer, the actor's death or the deadline; produces: verdicts, `failed` or `timed_out` where no answer
    came.
    Judging twice is harmless, so a group whose actor died goes to another one.
    """

    def __init__(self, config: VerifyConfig, spawn: Spawn) -> None:
        config.check()
        self._config = config
        self._started_with = config.processes
        self._spawn = spawn
        self._slots: list[_Slot] = []
        self._counter = VerdictCounter()
        self._respawns_left = config.respawns
        self._first_cause = ""
        self.hedged = 0
        self.told: Told = tell_nobody
        self.placed: Callable[[int], Awaitable[bool]] = _always
        self.missing: Callable[[str, str], None] = lambda _name, _cause: None

    async def start(self) -> None:
        """Starts the actors. Raises `VerifierError` when one cannot start, after ending the others."""
        handles = await asyncio.gather(
            *(self._spawn(index) for index in range(self._config.actors)), return_exceptions=True
        )
        self._slots = [
            _Slot(index, handle)
            for index, handle in enumerate(handles)
            if not isinstance(handle, BaseException)
        ]
        for error in handles:
            if isinstance(error, BaseException):
                await self.close()
                raise error

    async def judge(self, drawn: Drawn) -> tuple[Verdict, ...]:
        """One verdict per sample, in order. Raises `VerifierError` when no actor is left to ask."""
        request = judge_request(drawn)
        try:
            async with asyncio.timeout(self._config.judge_deadline_s):
                verdicts = await self._ask(request, drawn.texts)
        except TimeoutError:
            detail = f"no answer within verify.judge_deadline_s={self._config.judge_deadline_s}"
            verdicts = _without_answer(request, VerdictStatus.TIMED_OUT, detail)
        self._counter.add(verdicts)
        return verdicts

    async def resize(self, processes: int) -> None:
        """Every actor, also one that replaces another, goes on with so many processes. Raises `ConfigError`."""
        config = replace(self._config, processes=processes)
        config.check()
        self._config = config
        await asyncio.gather(*(self._resized(slot) for slot in self._slots))

    async def _resized(self, slot: _Slot) -> None:
        handle = slot.handle
        if handle is None:
            return
        try:
            async with asyncio.timeout(PING_DEADLINE_S):
                await handle.resize(self._config.processes)
        except (TimeoutError, ActorLostError):  # its replacement will have as many
            await asyncio.shield(self._suspect(slot, handle))

    @property
    def processes(self) -> int:
        """Of each actor."""
        return self._config.processes

    def stats(self) -> VerifyStats:
        """Verdicts so far by status, and seconds per completion."""
        return self._counter.stats()

    @property
    def handles(self) -> tuple[VerifyHandle, ...]:
        """The living actors."""
        return tuple(slot.handle for slot in self._slots if slot.handle is not None)

    async def close(self) -> None:
        """Ends the actors."""
        slots, self._slots = self._slots, []
        for slot in slots:
            tasks = [task for task in (slot.probe, slot.replacing) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if slot.handle is not None:
                slot.handle.kill()

    async def _ask(self, request: JudgeRequest, texts: Ref) -> tuple[Verdict, ...]:
        """The first answer of one actor, or of two where the first is slow."""
        if not self._config.hedge_after_s or len(self._slots) < 2:
            return await self._ask_one(request, texts)
        first = asyncio.create_task(self._ask_one(request, texts))
        asked = {first}
        try:
            await asyncio.wait(asked, timeout=self._config.hedge_after_s)
            if not first.done():
                self.hedged += 1
                asked.add(asyncio.create_task(self._ask_one(request, texts)))
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _ask_one(self, request: JudgeRequest, texts: Ref) -> tuple[Verdict, ...]:
        reason = ""
        while (slot := await self._chosen()) is not None:
            handle = slot.handle
            assert handle is not None
            slot.load += 1
            slot.asked.add(request.group_id)
            try:
                return await handle.judge(request, texts)
            except asyncio.CancelledError:  # the deadline, perhaps because the actor hangs
                self._suspect(slot, handle)
                raise
            except ActorLostError as error:
                reason = error.message
                await asyncio.shield(self._suspect(slot, handle))
            except RoleError as error:
                return _without_answer(request, VerdictStatus.FAILED, error.message)
            finally:
                slot.load -= 1
                slot.asked.discard(request.group_id)
        if not reason:
            raise VerifierError(
                f"verify, judge {request.group_id}: no verify actor is left after "
                f"{self._config.respawns} respawns; first cause: {self._first_cause}",
                "Look for the cause in the actors' logs; verify.respawns allows more.",
            )
        return _without_answer(request, VerdictStatus.FAILED, reason)

    async def _chosen(self) -> _Slot | None:
        """The least loaded actor. Where there is none, waits for one that is being replaced; None if none is."""
        while True:
            alive = [slot for slot in self._slots if slot.handle is not None]
            if alive:
                return min(alive, key=lambda slot: slot.load)
            coming = [slot.replacing for slot in self._slots if slot.replacing and not slot.replacing.done()]
            if not coming:
                return None
            await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)

    def _suspect(self, slot: _Slot, handle: VerifyHandle) -> asyncio.Task[None]:
        """The one probe of an actor under suspicion. It outlives the call that raised the suspicion."""
        if slot.probe is None or slot.probe.done():
            slot.probe = asyncio.create_task(self._probe(slot, handle, sorted(slot.asked)))
        return slot.probe

    async def _probe(self, slot: _Slot, suspect: VerifyHandle, judging: Sequence[str]) -> None:
        """Replaces an actor that does not answer a ping; one that does keeps its place."""
        if slot.handle is not suspect:
            return  # replaced while this suspicion arose
        try:
            async with asyncio.timeout(PING_DEADLINE_S):
                await suspect.ping()
        except (TimeoutError, RoleError) as error:
            noticed_s = time.monotonic()
            cause = str(error) or (
                f"it gave no verdict within verify.judge_deadline_s={self._config.judge_deadline_s:g}, and does not "
                f"answer a ping within {PING_DEADLINE_S:g} s; {await suspect.where()}"
            )
            cause = (
                f"verify-{slot.index}, judging {', '.join(judging[:5]) or 'nothing'}: {cause.rstrip('.')}."
            )
            self._first_cause = self._first_cause or cause
            _LOG.warning("verify: replacing an actor: %s", cause)
            suspect.kill()
            slot.handle = None  # the others take what comes meanwhile
            slot.replacing = asyncio.create_task(self._replace(slot, cause, noticed_s))

    async def _replace(self, slot: _Slot, cause: str, noticed_s: float) -> None:
        slot.handle = await self._replacement(slot.index, cause)
        if slot.handle is not None:
            seconds = time.monotonic() - noticed_s
            self.told(Replaced(role="verify", name=f"verify-{slot.index}", cause=cause, seconds=seconds))

    async def _replacement(self, index: int, cause: str) -> VerifyHandle | None:
        while self._respawns_left > 0:
            await self._until_placed(index, cause)
            self._respawns_left -= 1
            try:
                handle = await self._spawn(index)
                if self._config.processes != self._started_with:
                    await handle.resize(self._config.processes)
                return handle
            except RoleError as error:
                _LOG.warning("verify: an actor could not be replaced: %s", error)
        return None

    async def _until_placed(self, index: int, cause: str) -> None:
        """consumes: what the cluster says; waits for: a place for the actor; unblocked by: one, or the pool's closing;
        produces: one notice if there is none. It has no deadline: groups have."""
        noticed_s, told = time.monotonic(), False
        while not await self.placed(index):
            if not told and time.monotonic() - noticed_s > _NO_PLACE_S:
                self.missing(f"verify-{index}", cause)
                told = True
            await asyncio.sleep(_LOOK_S)


async def _always(_: int) -> bool:
    return True


def _without_answer(request: JudgeRequest, status: VerdictStatus, detail: str) -> tuple[Verdict, ...]:
    verdict = unscored(status, 0.0, f"verify, group {request.group_id}: {detail}", request.verifier)
    return (verdict,) * len(request.finished)
