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
from collections.abc import Collection, Mapping, Sequence

from treadle.actors.broadcast.config import BroadcastConfig
from treadle.actors.broadcast.phases import Fanout, Outcome, Receiver, flip, stage
from treadle.actors.broadcast.publication import Carried, Publication, Source, figures
from treadle.platform.errors import BroadcastError, DeadlineError, MismatchError
from treadle.platform.failpoints import failpoint
from treadle.platform.records import Offered, PublishReport, WeightVersion

_log = logging.getLogger(__name__)


class Coordinator:
    """Publishes versions and remembers the newest for engines that come later.

    With deltas, an engine is offered what changed since the version it is known to hold; the first publication of a
    publisher, and every `anchor_every`-th, is dense for all.
    """

    def __init__(
        self, config: BroadcastConfig, sources: Sequence[Source], receivers: Mapping[str, Receiver]
    ) -> None:
        self._config = config
        self._sources = tuple(sources)
        self._receivers = dict(receivers)
        self._newest: Publication | None = None
        self._published = 0  # by this publisher
        self._token = 0
        self._held: dict[str, WeightVersion] = {}
        self._fanout = Fanout()
        self._lock = asyncio.Lock()
        self.phase = "idle"

    @property
    def held(self) -> Mapping[str, WeightVersion]:
        """The version every engine is known to hold."""
        return dict(self._held)

    def register(self) -> int:
        """The fencing token of a new publisher (a driver, or a stage of it). Earlier publishers are refused
        from now on; the new one may start at any step, lower ones included."""
        self._token += 1
        self._newest = None
        self._published = 0
        return self._token

    async def publish(self, step: int, token: int) -> PublishReport:
        """Carries version `step` to the engines.

        Raises `BroadcastError` for an outdated token or step, when the learner offers nothing, or when no
        engine at all adopted, unless all are gone: their successors catch up; `MismatchError` when the learner's
        digest is wrong or an engine holds weights that nobody made; `DeadlineError` when the learner does not answer.
        """
        async with self._lock:
            self._refuse_outdated(step, token)
            self.phase = f"ranks gather version {step}"
            failpoint("broadcast.before_publish")
            start = time.monotonic()
            bases = self._bases()
            publication = await self._gather(step, frozenset(bases.values()))
            gathered_s = time.monotonic() - start
            carried = await self._carry(publication, self._receivers, bases)
            self.phase = "idle"
            self._newest = publication
            self._published += 1
            lags = {name: step - v.step for name, v in self._held.items() if name in self._receivers}
            return PublishReport(
                version=publication.version,
                adopted=carried.adopted,
                behind=carried.behind,
                sent_bytes=carried.sent_bytes,
                wall_s=time.monotonic() - start,
                metrics=figures(publication, carried, gathered_s, lags),
            )

    async def catch_up(self, name: str, receiver: Receiver) -> WeightVersion | None:
        """Brings a new or respawned engine to the newest version and includes it from now on.

        Returns None when this publisher has published nothing yet. Raises `BroadcastError` when the engine
        does not take the version.
        """
        async with self._lock:
            self._forget(name)
            self._receivers[name] = receiver
            if self._newest is None:
                return None
            carried = await self._carry(self._newest, {name: receiver}, {name: ""})
            if not carried.adopted:
                raise _nobody(self._newest.version, {name: "it was lost"})
            return self._held[name]

    async def forget(self, name: str) -> None:
        """Leaves an engine out, from the next publication on: one that is under way includes it."""
        async with self._lock:
            self._forget(name)

    def _forget(self, name: str) -> None:
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
        if self._newest is not None and step < self._newest.version.step:
            raise BroadcastError(
                f"broadcast.publish: step {step} is older than the published {self._newest.version.step}.",
                "Publish steps in order, or register as a new publisher to go back.",
            )

    def _bases(self) -> dict[str, str]:
        """For every engine the digest that it can be given a delta from, "" where it needs everything."""
        every = self._config.anchor_every
        anchor = self._published % every == 0 if every else self._published == 0
        usable = {} if anchor or self._config.delta == "off" else self._held
        return {name: usable[name].digest if name in usable else "" for name in self._receivers}

    async def _gather(self, step: int, bases: Collection[str]) -> Publication:
        """Every rank is called, because sharded weights are gathered by all of them together."""
        limit_s = self._config.gather_deadline_s
        tasks = [asyncio.create_task(_publish(source, step, bases)) for source in self._sources]
        done, waiting = await asyncio.wait(tasks, timeout=limit_s, return_when=asyncio.FIRST_EXCEPTION)
        for rank, task in enumerate(tasks):
            if task in done and (error := task.exception()) is not None:
                _abandon(waiting)
                why, remedy = (
                    (error.message, error.remedy) if isinstance(error, BroadcastError) else (error, "")
                )
                raise BroadcastError(
                    f"broadcast.gather: learner rank {rank} could not offer version {step}: {why}",
                    remedy or "Look at that rank's log.",
                ) from error
        if waiting:
            late = [rank for rank, task in enumerate(tasks) if task in waiting]
            said = await asyncio.gather(*(source.doing() for source in self._sources))
            _abandon(waiting)
            raise DeadlineError(
                f"broadcast.gather: learner ranks {late} did not offer version {step} within {limit_s:g} s; "
                f"{'; '.join(f'rank {rank}: {doing}' for rank, doing in enumerate(said))}.",
                "Raise broadcast.gather_deadline_s, or look for a frozen rank.",
            )
        offers = [(s, offered) for s, t in zip(self._sources, tasks, strict=True) if (offered := t.result())]
        if len(offers) != 1:
            raise BroadcastError(
                f"broadcast.gather: {len(offers)} of {len(tasks)} learner ranks offered version {step}, "
                "expected exactly one.",
                "Only rank 0 may return an offer.",
            )
        source, offered = offers[0]
        version = offered.dense.version
        if version.step != step or not version.digest:
            raise MismatchError(
                f"broadcast.gather: asked for step {step}, the learner offered step {version.step} "
                f"with digest {version.digest or 'missing'}.",
                "Step the learner before publishing, and pack with broadcast.buckets.pack.",
            )
        return Publication(source, offered, limit_s)

    async def _carry(
        self, publication: Publication, receivers: Mapping[str, Receiver], bases: Mapping[str, str]
    ) -> Carried:
        version = publication.version
        start = time.monotonic()
        self.phase = f"engines fetch version {version.step}"
        routes = {name: await publication.route(bases[name]) for name in receivers}
        staged = await self._fanout.run(receivers, stage, routes, self._config.stage_deadline_s)
        self.phase = f"engines adopt version {version.step}"
        _refuse_a_wrong_manifest(version, staged)
        failpoint("broadcast.between_phases")
        middle = time.monotonic()
        ready = {name: receivers[name] for name, outcome in staged.items() if not outcome.reason}
        flipped = await self._fanout.run(ready, flip, routes, self._config.flip_deadline_s)
        failpoint("broadcast.after_flip")
        adopted = tuple(name for name, outcome in flipped.items() if not outcome.reason)
        behind = {name: out.reason for name, out in {**staged, **flipped}.items() if out.reason}
        self._held.update(dict.fromkeys(adopted, version))
        self._refuse_unknown_weights(version, flipped)
        lost = {name for name, out in {**staged, **flipped}.items() if out.lost}
        if behind and not adopted and lost != behind.keys():
            raise _nobody(version, behind)
        for name, reason in behind.items():
            _log.warning("engine %s is left behind version %d: %s", name, version.step, reason)
        return Carried(
            adopted=adopted,
            behind=tuple(behind),
            staged=tuple(staged.values()),
            flipped=tuple(flipped.values()),
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


def _nobody(version: WeightVersion, behind: Mapping[str, str]) -> BroadcastError:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in behind.items())
    return BroadcastError(
        f"broadcast.publish: no engine adopted version {version.step} ({reasons}).",
        "Look at the engines' logs.",
    )


async def _publish(source: Source, step: int, bases: Collection[str]) -> Offered | None:
    return await source.publish(step, bases)


def _abandon(tasks: set[asyncio.Task[Offered | None]]) -> None:
    for task in tasks:
        task.cancel()
