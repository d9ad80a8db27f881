"""The weight coordinator: one version at a time, from the learner's ranks to the engines, in two phases.

Phase 1 (stage): every engine fetches the version and answers with the digest of what arrived. Phase 2 (flip):
engines whose digest is the manifest's adopt it between two decode steps and answer with the digest of the
weights they now hold. An engine that fails or passes its deadline in phase 1 keeps its old version whole;
it is named in the report and catches up at the next publication. Nobody ever serves a mixture.

The coordinator is plain asyncio; `actor.py` puts it into a Ray actor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from treadle.actors.broadcast.config import BroadcastConfig
from treadle.actors.broadcast.phases import Fanout, Offer, Outcome, Receiver, flip, stage
from treadle.platform.errors import BroadcastError, DeadlineError, MismatchError
from treadle.platform.failpoints import failpoint
from treadle.platform.records import PublishReport, WeightVersion

_log = logging.getLogger(__name__)


class Source(Protocol):
    """A rank of the learner."""

    async def publish(self, step: int) -> Offer | None:
        """Takes part in the gathering; the rank that packed the version returns manifest and ticket."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Carried:
    """A version after both phases; `fetched` engines hold its bytes, whether they adopted them or not."""

    adopted: tuple[str, ...]
    behind: tuple[str, ...]
    fetched: int
    stage_s: float
    flip_s: float


class Coordinator:
    """Publishes versions and remembers the newest, with its ticket, for engines that come later."""

    def __init__(
        self, config: BroadcastConfig, sources: Sequence[Source], receivers: Mapping[str, Receiver]
    ) -> None:
        self._config = config
        self._sources = tuple(sources)
        self._receivers = dict(receivers)
        self._newest: Offer | None = None
        self._token = 0
        self._held: dict[str, WeightVersion] = {}
        self._fanout = Fanout()
        self._lock = asyncio.Lock()

    @property
    def held(self) -> Mapping[str, WeightVersion]:
        """The version every engine is known to hold."""
        return dict(self._held)

    def register(self) -> int:
        """The fencing token of a new publisher (a driver, or a stage of it). Earlier publishers are refused
        from now on; the new one may start at any step, lower ones included."""
        self._token += 1
        self._newest = None
        return self._token

    async def publish(self, step: int, token: int) -> PublishReport:
        """Carries version `step` to the engines.

        Raises `BroadcastError` for an outdated token or step, when the learner offers nothing, or when no
        engine at all adopted; `MismatchError` when the learner's digest is wrong or an engine holds weights
        that nobody made; `DeadlineError` when the learner does not answer.
        """
        async with self._lock:
            self._refuse_outdated(step, token)
            failpoint("broadcast.before_publish")
            start = time.monotonic()
            offer = await self._gather(step)
            gathered = time.monotonic()
            carried = await self._carry(offer, self._receivers)
            self._newest = offer
            return PublishReport(
                version=offer[0].version,
                adopted=carried.adopted,
                behind=carried.behind,
                sent_bytes=offer[0].total_bytes * carried.fetched,
                wall_s=time.monotonic() - start,
                metrics={
                    "weights/gather_s": gathered - start,
                    "weights/stage_s": carried.stage_s,
                    "weights/flip_s": carried.flip_s,
                },
            )

    async def catch_up(self, name: str, receiver: Receiver) -> WeightVersion | None:
        """Brings a new or respawned engine to the newest version and includes it from now on.

        Returns None when this publisher has published nothing yet. Raises `BroadcastError` when the engine
        does not take the version.
        """
        async with self._lock:
            self.forget(name)
            self._receivers[name] = receiver
            if self._newest is None:
                return None
            await self._carry(self._newest, {name: receiver})
            return self._held[name]

    def forget(self, name: str) -> None:
        """Leaves an engine out from now on."""
        self._receivers.pop(name, None)
        self._held.pop(name, None)
        self._fanout.forget(name)

    def _refuse_outdated(self, step: int, token: int) -> None:
        if token != self._token:
            raise BroadcastError(
                f"broadcast.publish: publisher {token} was replaced by publisher {self._token}; "
                f"step {step} is refused.",
                "Stop this driver: another one has taken over the run.",
            )
        if self._newest is not None and step < self._newest[0].version.step:
            raise BroadcastError(
                f"broadcast.publish: step {step} is older than the published {self._newest[0].version.step}.",
                "Publish steps in order, or register as a new publisher to go back.",
            )

    async def _gather(self, step: int) -> Offer:
        """Every rank is called, because sharded weights are gathered by all of them together."""
        limit_s = self._config.gather_deadline_s
        tasks = [asyncio.create_task(_publish(source, step)) for source in self._sources]
        done, waiting = await asyncio.wait(tasks, timeout=limit_s, return_when=asyncio.FIRST_EXCEPTION)
        for rank, task in enumerate(tasks):
            if task in done and (error := task.exception()) is not None:
                _abandon(waiting)
                raise BroadcastError(
                    f"broadcast.gather: learner rank {rank} could not offer version {step}: {error}",
                    "Look at that rank's log.",
                ) from error
        if waiting:
            late = [rank for rank, task in enumerate(tasks) if task in waiting]
            _abandon(waiting)
            raise DeadlineError(
                f"broadcast.gather: learner ranks {late} did not offer version {step} within {limit_s:g} s.",
                "Raise broadcast.gather_deadline_s, or look for a frozen rank.",
            )
        offers = [offer for task in tasks if (offer := task.result()) is not None]
        if len(offers) != 1:
            raise BroadcastError(
                f"broadcast.gather: {len(offers)} of {len(tasks)} learner ranks offered version {step}, "
                "expected exactly one.",
                "Only rank 0 may return a manifest and a ticket.",
            )
        version = offers[0][0].version
        if version.step != step or not version.digest:
            raise MismatchError(
                f"broadcast.gather: asked for step {step}, the learner offered step {version.step} "
                f"with digest {version.digest or 'missing'}.",
                "Step the learner before publishing, and pack with broadcast.buckets.pack.",
            )
        return offers[0]

    async def _carry(self, offer: Offer, receivers: Mapping[str, Receiver]) -> _Carried:
        version = offer[0].version
        start = time.monotonic()
        staged = await self._fanout.run(receivers, stage, offer, self._config.stage_deadline_s)
        _refuse_a_wrong_manifest(version, staged)
        failpoint("broadcast.between_phases")
        middle = time.monotonic()
        ready = {name: receivers[name] for name, outcome in staged.items() if not outcome.reason}
        flipped = await self._fanout.run(ready, flip, offer, self._config.flip_deadline_s)
        failpoint("broadcast.after_flip")
        adopted = tuple(name for name, outcome in flipped.items() if not outcome.reason)
        behind = {name: out.reason for name, out in {**staged, **flipped}.items() if out.reason}
        self._held.update(dict.fromkeys(adopted, version))
        self._refuse_unknown_weights(version, flipped)
        _refuse_to_go_on_without_engines(version, adopted, behind)
        for name, reason in behind.items():
            _log.warning("engine %s is left behind version %d: %s", name, version.step, reason)
        return _Carried(
            adopted=adopted,
            behind=tuple(behind),
            fetched=len(ready),
            stage_s=middle - start,
            flip_s=time.monotonic() - middle,
        )

    def _refuse_unknown_weights(self, version: WeightVersion, flipped: Mapping[str, Outcome]) -> None:
        for name, outcome in flipped.items():
            if not outcome.digest or not outcome.reason:
                continue
            self._held.pop(name, None)
            raise MismatchError(
                f"broadcast.flip: engine {name}: version {version.step} {outcome.reason}, repeatedly.",
                "Its loader changes or drops weights (tied embeddings?): do not draw with it.",
            )


def _refuse_a_wrong_manifest(version: WeightVersion, staged: Mapping[str, Outcome]) -> None:
    """Engines that agree with each other and not with the learner prove the learner wrong."""
    digests = {outcome.digest for outcome in staged.values() if outcome.digest}
    if len(staged) > 1 and len(digests) == 1 and version.digest not in digests:
        raise MismatchError(
            f"broadcast.stage: all engines received version {version.step} with digest {digests.pop()}, the "
            f"learner's manifest says {version.digest}.",
            "The learner changed its weights while packing them; publish between two steps.",
        )


def _refuse_to_go_on_without_engines(
    version: WeightVersion, adopted: Sequence[str], behind: Mapping[str, str]
) -> None:
    if behind and not adopted:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in behind.items())
        raise BroadcastError(
            f"broadcast.publish: no engine adopted version {version.step} ({reasons}).",
            "Look at the engines' logs.",
        )


async def _publish(source: Source, step: int) -> Offer | None:
    return await source.publish(step)


def _abandon(tasks: set[asyncio.Task[Offer | None]]) -> None:
    for task in tasks:
        task.cancel()
