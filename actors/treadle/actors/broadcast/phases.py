"""One phase of a publication, on one engine and on all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from treadle.actors.broadcast.deltas import StaleBaseError
from treadle.platform.errors import BroadcastError, RoleError
from treadle.platform.records import Ref, Staged, WeightManifest, WeightVersion

Offer: TypeAlias = tuple[WeightManifest, Ref]
"""A version, whole or as a delta: its manifest and the ticket to fetch it with."""


class Receiver(Protocol):
    """An engine, as the coordinator sees it."""

    async def stage(self, manifest: WeightManifest, ticket: object) -> Staged:
        """Fetches the version beside the one in use; answers with the digest of what is there then."""
        ...

    async def flip(self, version: WeightVersion) -> str:
        """Adopts what was staged; returns the digest of the weights now in use."""
        ...


class EngineLostError(RoleError):
    """An engine's process is gone. Its successor is brought up to date when it joins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """How one engine reaches a version: the offer it is given, and how to ask for the dense one."""

    offer: Offer
    dense: Callable[[], Awaitable[Offer]]

    @property
    def version(self) -> WeightVersion:
        return self.offer[0].version


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one engine in one phase: the digest it answered, if it did, and why it must be left
    behind (empty when the digest is the manifest's). `sent_bytes` and `refused` count all attempts; `by_delta`,
    `wire_s` and `apply_s` are the last one's. `stale` says that the engine does not have the base of a delta."""

    digest: str = ""
    reason: str = ""
    sent_bytes: int = 0
    refused: int = 0
    wire_s: float = 0.0
    apply_s: float = 0.0
    by_delta: bool = False
    stale: bool = False
    lost: bool = False
    """The engine's process is gone."""


async def stage(receiver: Receiver, route: Route) -> Outcome:
    """Phase 1 on one engine. What arrives damaged is fetched once more; a delta that fails twice, or meets other
    weights than its base, gives way to the dense version."""
    outcome = await _twice(receiver, route.offer)
    if not outcome.reason or route.offer[0].base is None:
        return outcome
    return _after(outcome, await _twice(receiver, await route.dense()))


async def flip(receiver: Receiver, route: Route) -> Outcome:
    """Phase 2 on one engine. Wrong weights are staged, whole, and adopted once more."""
    first = await _flipped(receiver, route.version)
    if not first.digest or not first.reason:
        return first
    again = await _twice(receiver, await route.dense())
    return first if again.reason else _after(again, await _flipped(receiver, route.version))


async def _twice(receiver: Receiver, offer: Offer) -> Outcome:
    first = await _staged(receiver, offer)
    if not first.reason or first.stale:
        return first
    return _after(first, await _staged(receiver, offer))


async def _staged(receiver: Receiver, offer: Offer) -> Outcome:
    manifest = offer[0]
    try:
        answer = await receiver.stage(*offer)
    except BroadcastError as error:
        stale = isinstance(error, StaleBaseError)
        return Outcome(reason=_first_line(error), sent_bytes=manifest.total_bytes, refused=1, stale=stale)
    compared = _compared(answer.digest, manifest.version, "arrived")
    return replace(
        compared,
        sent_bytes=manifest.total_bytes,
        refused=int(bool(compared.reason)),
        wire_s=answer.wire_s,
        apply_s=answer.apply_s,
        by_delta=manifest.base is not None,
    )


async def _flipped(receiver: Receiver, version: WeightVersion) -> Outcome:
    return _compared(await receiver.flip(version), version, "was adopted")


def _compared(digest: str, version: WeightVersion, what: str) -> Outcome:
    if digest == version.digest:
        return Outcome(digest=digest)
    return Outcome(digest=digest, reason=f"{what} with digest {digest} instead of {version.digest}")


def _after(first: Outcome, second: Outcome) -> Outcome:
    """The second attempt, with what the first one cost."""
    return replace(
        second, sent_bytes=first.sent_bytes + second.sent_bytes, refused=first.refused + second.refused
    )


class Fanout:
    """Runs a phase on many engines at once. Each has the whole deadline and holds up nobody after it.

    An engine still busy with a call of an earlier phase is not called again: a frozen engine costs one
    deadline and not one per publication.
    """

    def __init__(self) -> None:
        self._late: dict[str, asyncio.Task[Outcome]] = {}

    def forget(self, name: str) -> None:
        """The engine was replaced: what its predecessor is busy with no longer counts."""
        if (task := self._late.pop(name, None)) is not None:
            task.cancel()

    async def run(
        self,
        receivers: Mapping[str, Receiver],
        phase: Callable[[Receiver, Route], Coroutine[Any, Any, Outcome]],
        routes: Mapping[str, Route],
        deadline_s: float,
    ) -> dict[str, Outcome]:
        """The outcome of every receiver, by name; an engine's failure is an outcome, not an error."""
        self._late = {name: task for name, task in self._late.items() if not task.done()}
        tasks = {
            name: asyncio.ensure_future(_guarded(phase(receiver, routes[name])))
            for name, receiver in receivers.items()
            if name not in self._late
        }
        if tasks:
            await asyncio.wait(tasks.values(), timeout=deadline_s)
        outcomes = {}
        for name in receivers:
            if name not in tasks:
                outcomes[name] = Outcome(reason="still busy with an earlier version")
            elif tasks[name].done():
                outcomes[name] = tasks[name].result()
            else:
                self._late[name] = tasks[name]
                outcomes[name] = Outcome(reason=f"{phase.__name__} took longer than {deadline_s:g} s")
        return outcomes


async def _guarded(work: Coroutine[Any, Any, Outcome]) -> Outcome:
    try:
        return await work
    except Exception as error:  # noqa: BLE001 whatever an engine dies of, it is left behind and named
        return Outcome(reason=_first_line(error), lost=isinstance(error, EngineLostError))


def _first_line(error: Exception) -> str:
    """The error in one line; a remote traceback ends with what was raised."""
    message = getattr(error, "message", "") or str(error).strip().splitlines()[0:1]
    text = message if isinstance(message, str) else "".join(message)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
