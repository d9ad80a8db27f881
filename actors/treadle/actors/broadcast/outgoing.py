"""What the learner's rank 0 is handed to publish with."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from treadle.actors.broadcast.buckets import pack
from treadle.actors.broadcast.kept import Kept
from treadle.actors.broadcast.transports import build, chosen
from treadle.platform import metric_names as names
from treadle.platform.records import Offered, Ref, WeightManifest

DENSE = frozenset({""})
"""What engines without a usable base ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A transport by name, the size of its buckets and the delta policy: small enough to travel with every call.
    How many `engines` there are, and `nodes` in the cluster, helps to choose the transport where it is "auto".

    With `delta` the process that offers keeps what it offered last (see `kept`), as long as it holds on to this
    object: a copy from elsewhere remembers nothing. Keeps `contracts.Transport`. Example, in the rank that has the
    full weights: `offered = outgoing.offer(backend.full_state(), step, DENSE)`.
    """

    transport: str
    bucket_bytes: int
    delta: bool = False
    dense_above: float = 1.0
    engines: int = field(default=1, compare=False)
    nodes: int = field(default=1, compare=False)
    _kept: Kept = field(default_factory=Kept, compare=False, repr=False)

    def offer(self, state: Iterable[tuple[str, torch.Tensor]], step: int, bases: Collection[str]) -> Offered:
        """Packs the weights and makes them fetchable from each of `bases`: digests that engines hold, or "" for
        everything. Without deltas, everything is what all get."""
        if self.delta:
            renewed = self._kept.renew(
                state, step, bases, bucket_bytes=self.bucket_bytes, dense_above=self.dense_above
            )
            ways = tuple((manifest, self.send(manifest, buckets)) for manifest, buckets in renewed.ways)
            return Offered(dense=renewed.dense, ways=ways, metrics=renewed.metrics)
        start = time.monotonic()
        manifest, buckets = pack(state, step, self.bucket_bytes)
        metrics = {names.WEIGHTS_GATHER_S: time.monotonic() - start}
        return Offered(dense=manifest, ways=((manifest, self.send(manifest, buckets)),), metrics=metrics)

    def dense(self, step: int) -> tuple[WeightManifest, Ref]:
        """Makes the whole of version `step`, offered last and with deltas, fetchable. Raises `BroadcastError` when
        it is not kept."""
        manifest, buckets = self._kept.dense(step)
        return manifest, self.send(manifest, buckets)

    def send(self, manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]]) -> object:
        name = chosen(self.transport, manifest.total_bytes, self.engines, self.nodes)
        return build(name).send(manifest, buckets)

    def receive(self, ticket: object, deadline_s: float) -> list[NDArray[np.uint8]]:
        return build(getattr(ticket, "transport", self.transport)).receive(ticket, deadline_s)
