"""The weight coordinator's Ray shell: handles in, plain coordinator inside."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ray

from treadle.actors.broadcast.config import BroadcastConfig
from treadle.actors.broadcast.coordinator import Coordinator
from treadle.actors.broadcast.outgoing import Outgoing
from treadle.actors.broadcast.phases import EngineLostError, Offer
from treadle.actors.broadcast.transports import spread
from treadle.actors.calls import call, call_once, once
from treadle.actors.deaths import GONE, why
from treadle.actors.learner.heartbeat import phases
from treadle.platform.errors import BroadcastError
from treadle.platform.memory import remedy
from treadle.platform.records import Offered, PublishReport, Staged, WeightManifest, WeightVersion
from treadle.platform.rollcall import enlist
from treadle.platform.stacks import places

OFFER_PART = 0.9
"""Of the time to gather and offer a version: who writes it shall be able to say what failed before time is up."""


class RaySource:
    """A learner rank behind its handle. The rank has `publish(step, outgoing, bases)`, `dense(step)` and `phase()`."""

    def __init__(self, handle: Any, outgoing: Outgoing) -> None:
        self._handle = handle
        self._outgoing = outgoing

    async def publish(self, step: int, bases: Collection[str]) -> Offered | None:
        return await _from_rank(call_once(self._handle, "publish", step, self._outgoing, bases))

    async def dense(self, step: int) -> Offer:
        return await _from_rank(call(self._handle, "dense", step))

    async def doing(self) -> str:
        [said] = await phases([self._handle])
        return said or "no answer"


class RayReceiver:
    """An engine's worker behind its handle. The worker has `stage(manifest, ticket)` and `flip(version)`."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def stage(self, manifest: WeightManifest, ticket: object) -> Staged:
        return await _from_engine(call_once(self._handle, "stage", manifest, ticket))

    async def flip(self, version: WeightVersion) -> str:
        return await _from_engine(call_once(self._handle, "flip", version))


async def _from_rank(reference: Any) -> Any:
    try:
        return await reference
    except GONE as error:
        raise BroadcastError(f"{(cause := why(error))}.", remedy("learner", cause)) from error


async def _from_engine(reference: Any) -> Any:
    try:
        return await reference
    except GONE as error:
        raise EngineLostError(f"{why(error)}.") from error


@ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"health": 1})
class CoordinatorActor:
    """See `Coordinator`. It is not restarted: a restarted one would have forgotten who may publish. `where` answers
    while everything else hangs."""

    def __init__(self, config: BroadcastConfig, ranks: Sequence[Any], engines: Mapping[str, Any]) -> None:
        enlist("broadcast-0")
        nodes = [node for node in ray.nodes() if node["Alive"]]
        outgoing = Outgoing(
            transport=config.transport,
            bucket_bytes=config.bucket_bytes,
            delta=config.delta == "auto",
            dense_above=config.dense_above,
            engines=len(engines),
            nodes=len(nodes),
            far=bool(config.url) and spread([node.get("Labels") or {} for node in nodes]),
            url=config.url,
            url_timeout_s=config.url_timeout_s,
            deadline_s=OFFER_PART * config.gather_deadline_s,
        )
        self._coordinator = Coordinator(
            config,
            [RaySource(rank, outgoing) for rank in ranks],
            {name: RayReceiver(engine) for name, engine in engines.items()},
        )

    @once
    async def register(self) -> int:
        return self._coordinator.register()

    @once
    async def publish(self, step: int, token: int) -> PublishReport:
        return await self._coordinator.publish(step, token)

    @once
    async def catch_up(self, name: str, engine: Any) -> WeightVersion | None:
        return await self._coordinator.catch_up(name, RayReceiver(engine))

    @once
    async def forget(self, name: str) -> None:
        await self._coordinator.forget(name)

    async def phase(self) -> str:
        """What it is doing; answers while the event loop turns."""
        return self._coordinator.phase

    @ray.method(concurrency_group="health")
    async def where(self) -> str:
        return places()

    @once
    async def held(self) -> Mapping[str, WeightVersion]:
        return self._coordinator.held


def start_coordinator(config: BroadcastConfig, ranks: Sequence[Any], engines: Mapping[str, Any]) -> Any:
    """The handle of a new coordinator over the learner's rank actors and the engines' worker actors by
    name."""
    actor: Any = CoordinatorActor  # what ray.remote returns is untyped
    return actor.remote(config, ranks, engines)
