"""Light learner ranks and engines with real weights, for tests of publications.

They keep the promises of the real ones: an engine fetches beside the weights in use, adopts a whole version
at once, and answers with digests of what it really holds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping

import torch

from treadle.actors.broadcast.gloo import GlooTransport
from treadle.actors.broadcast.outgoing import Outgoing
from treadle.actors.broadcast.phases import Offer
from treadle.actors.broadcast.standby import Standby
from treadle.actors.broadcast.transports import fetch
from treadle.kernels.digest import state_digest
from treadle.platform.errors import BroadcastError
from treadle.platform.records import Offered, Staged, WeightManifest, WeightVersion


def weights(step: int, tensors: int = 4, size: int = 200) -> dict[str, torch.Tensor]:
    """The weights of version `step`: different in every element from every other version's."""
    return {f"layer{i}.weight": torch.full((size,), float(step * 1000 + i)) for i in range(tensors)}


def sparse_weights(step: int, tensors: int = 4, size: int = 200) -> dict[str, torch.Tensor]:
    """The weights of version `step`: one element in forty changes per version, wandering through the tensors."""
    found = weights(0, tensors, size)
    for tensor in found.values():
        for one in range(1, step + 1):
            tensor[one % 40 :: 40] += one
    return found


class LoopbackGloo(GlooTransport):
    """The node's address is Ray's to tell; here there is no Ray."""

    def __init__(self) -> None:
        super().__init__(host="127.0.0.1")


class FakeRank:
    """Rank 0 offers, the others only take part."""

    def __init__(
        self,
        rank: int,
        tensors: int = 4,
        size: int = 200,
        make: Callable[..., dict[str, torch.Tensor]] = weights,
    ) -> None:
        self.rank = rank
        self.calls = 0
        self.tensors, self.size = tensors, size
        self.make = make
        self._outgoing: Outgoing | None = None

    def publish(self, step: int, outgoing: Outgoing, bases: Collection[str]) -> Offered | None:
        self.calls += 1
        if self.rank != 0:
            return None
        if self._outgoing != outgoing:
            self._outgoing = outgoing
        return self._outgoing.offer(self.make(step, self.tensors, self.size).items(), step, bases)

    def dense(self, step: int) -> Offer:
        assert self._outgoing is not None
        return self._outgoing.dense(step)


class FakeEngine:
    """Serves `weights`; `slow_s` delays staging, `spoil` makes its loader change an element on adoption. `fetches`
    are the manifests of what it was offered, each of which it waits `deadline_s` for."""

    def __init__(
        self, name: str = "engine", slow_s: float = 0.0, spoil: int = 0, deadline_s: float = 20.0
    ) -> None:
        self.deadline_s = deadline_s
        self.name = name
        self.slow_s = slow_s
        self.spoil = spoil
        self.fetches: list[WeightManifest] = []
        self.weights: Mapping[str, torch.Tensor] = weights(0)
        self.version = WeightVersion(step=0)
        self.standby = Standby()

    def stage(self, manifest: WeightManifest, ticket: object) -> Staged:
        time.sleep(self.slow_s)
        self.fetches.append(manifest)
        digest = self.standby.put(manifest, fetch(manifest, ticket, self.deadline_s))
        return Staged(digest=digest, wire_s=0.01, apply_s=0.02)

    def flip(self, version: WeightVersion) -> str:
        if self.standby.version != version:
            raise BroadcastError(f"{self.name}: version {version.step} is not staged.")
        self.weights = {name: tensor.clone() for name, tensor in self.standby.tensors()}
        self.version = version
        self.standby.adopted()
        if self.spoil:
            self.spoil -= 1
            next(iter(self.weights.values()))[0] += 1
        return state_digest(self.weights.items())

    def serves(self) -> tuple[int, set[int]]:
        """The version it claims, and the versions its tensors really come from."""
        steps = {int(v) // 1000 for tensor in self.weights.values() for v in tensor.unique()}
        return self.version.step, steps


class InProcessRank:
    """A rank as the coordinator sees it, without Ray."""

    def __init__(self, rank: FakeRank, outgoing: Outgoing) -> None:
        self.rank, self.outgoing = rank, outgoing

    async def publish(self, step: int, bases: Collection[str]) -> Offered | None:
        return self.rank.publish(step, self.outgoing, bases)

    async def dense(self, step: int) -> Offer:
        return self.rank.dense(step)

    async def doing(self) -> str:
        return f"offering ({type(self).__name__})"


class InProcessEngine:
    """An engine as the coordinator sees it, without Ray; `frozen` makes it never answer."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.frozen = False
        self.stages = 0

    async def stage(self, manifest: WeightManifest, ticket: object) -> Staged:
        self.stages += 1
        if self.frozen:
            await asyncio.Event().wait()
        return await asyncio.to_thread(self.engine.stage, manifest, ticket)

    async def flip(self, version: WeightVersion) -> str:
        return await asyncio.to_thread(self.engine.flip, version)
