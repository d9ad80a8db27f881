"""Places of a role whose number of actors changes while the run goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from treadle.cluster.placement import Placement, reserve
from treadle.platform.errors import ClusterError, PlacementError
from treadle.platform.records import RoleSpec


class Places:
    """The first `spec.count` actors stand where the run's placement has reserved their bundles, and keep these while
    they are away; each further one has a reservation of its own, from before it starts until it has left.

    An embedded Ray counts CPUs and reserves no cores, for the roles it was started with: there a further actor asks for
    none.
    """

    def __init__(self, placement: Placement, spec: RoleSpec, *, embedded: bool, deadline_s: float) -> None:
        self._placement, self._spec, self._deadline_s = placement, spec, deadline_s
        self._one = replace(spec, count=1, cpus=0.0 if embedded else spec.cpus)
        self._further: dict[int, Placement | None] = {}
        self._refused: dict[int, PlacementError] = {}

    def options(self, index: int) -> dict[str, Any]:
        """The actor options of actor `index`. Raises `PlacementError` with why it has no place."""
        if index < self._spec.count:
            return self._placement.options(self._spec.role, index)
        if index in self._refused:
            raise self._refused[index]
        placement = self._further.get(index)
        return placement.options(self._spec.role, 0) if placement else {"num_cpus": 0}

    async def reserve(self, count: int) -> None:
        """Reserves what the first `count` actors need besides. `options` says what was refused."""
        wanted = [index for index in range(self._spec.count, count) if index not in self._further]
        self._refused.clear()
        await asyncio.gather(*map(self._reserve, wanted))

    async def _reserve(self, index: int) -> None:
        needs = self._one.cpus or self._one.gpus or self._one.memory_bytes
        try:
            self._further[index] = (
                await asyncio.to_thread(reserve, [self._one], self._deadline_s) if needs else None
            )
        except PlacementError as error:
            self._refused[index] = error

    def give_back(self, kept: Collection[int]) -> None:
        """Releases the further places of all actors but these."""
        for index in self._further.keys() - set(kept):
            if placement := self._further.pop(index):
                placement.release()

    async def has(self, index: int) -> bool:
        """Whether a living node holds the actor's place now: a node's bundles are lost with it, until Ray finds another
        node for them."""
        placement, of_group = self._placement, index
        if index >= self._spec.count:
            further, of_group = self._further.get(index), 0
            if further is None:
                return True
            placement = further
        try:
            return await asyncio.to_thread(placement.held, self._spec.role, of_group)
        except ClusterError:  # nobody knows: the actor's own deadlines count
            return True

    def nodes(self) -> frozenset[str]:
        """The nodes of all further places. Asks Ray's head: not for an event loop."""
        return frozenset().union(*(p.nodes() for p in list(self._further.values()) if p is not None))
