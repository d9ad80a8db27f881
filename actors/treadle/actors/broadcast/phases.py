"""One phase of a publication, on one engine and on all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from treadle.platform.errors import BroadcastError
from treadle.platform.records import WeightManifest, WeightVersion

Offer: TypeAlias = tuple[WeightManifest, object]
"""A version: its manifest and the ticket to fetch it with."""


class Receiver(Protocol):
    """An engine, as the coordinator sees it."""

    async def stage(self, manifest: WeightManifest, ticket: object) -> str:
        """Fetches the version beside the one in use; returns the digest of what arrived."""
        ...

    async def flip(self, version: WeightVersion) -> str:
        """Adopts what was staged; returns the digest of the weights now in use."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one engine in one phase: the digest it answered, if it did, and why it must be left
    behind (empty when the digest is the manifest's)."""

    digest: str = ""
    reason: str = ""


async def stage(receiver: Receiver, offer: Offer) -> Outcome:
    """Phase 1 on one engine. What arrives damaged is fetched once more."""
    first = await _staged(receiver, offer)
    return first if not first.reason else await _staged(receiver, offer)


async def flip(receiver: Receiver, offer: Offer) -> Outcome:
    """Phase 2 on one engine. Wrong weights are staged and adopted once more."""
    first = await _flipped(receiver, offer)
    if not first.digest or not first.reason:
        return first
    again = await stage(receiver, offer)
    return first if again.reason else await _flipped(receiver, offer)


async def _staged(receiver: Receiver, offer: Offer) -> Outcome:
    try:
        digest = await receiver.stage(*offer)
    except BroadcastError as error:
        return Outcome(reason=_first_line(error))
    return _compared(digest, offer[0].version, "arrived")


async def _flipped(receiver: Receiver, offer: Offer) -> Outcome:
    return _compared(await receiver.flip(offer[0].version), offer[0].version, "was adopted")


def _compared(digest: str, version: WeightVersion, what: str) -> Outcome:
    if digest == version.digest:
        return Outcome(digest=digest)
    return Outcome(digest=digest, reason=f"{what} with digest {digest} instead of {version.digest}")


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
        phase: Callable[[Receiver, Offer], Coroutine[Any, Any, Outcome]],
        offer: Offer,
        deadline_s: float,
    ) -> dict[str, Outcome]:
        """The outcome of every receiver, by name; an engine's failure is an outcome, not an error."""
        self._late = {name: task for name, task in self._late.items() if not task.done()}
        tasks = {
            name: asyncio.ensure_future(_guarded(phase(receiver, offer)))
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
        return Outcome(reason=_first_line(error))


def _first_line(error: Exception) -> str:
    """The error in one line; a remote traceback ends with what was raised."""
    message = getattr(error, "message", "") or str(error).strip().splitlines()[0:1]
    text = message if isinstance(message, str) else "".join(message)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
