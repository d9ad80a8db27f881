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
from treadle.actors.broadcast.transports import URL, build, chosen
from treadle.platform import metric_names as names
from treadle.platform.records import Offered, Ref, WeightManifest

DENSE = frozenset({""})
"""What engines without a usable base ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A transport by name, the size of its buckets and the delta policy: small enough to travel with every call.
    How many `engines` there are, and `nodes` in the cluster, and whether these are `far` from each other, helps to
    choose the transport where it is "auto". `url` and `url_timeout_s` are for the transport of that name; what must be
    written is written within `deadline_s` of being asked for.

    With `delta` the process that offers keeps what it offered last (see `kept`), as long as it holds on to this
    object: a copy from elsewhere remembers nothing. Keeps `contracts.Transport`. Example, in the rank that has the
    full weights: `offered = outgoing.offer(backend.full_state(), step, DENSE)`.
    """

    transport: str
    bucket_bytes: int
    delta: bool = False
    dense_above: float = 1.0
    url: str = ""
    url_timeout_s: float = 20.0
    deadline_s: float = 300.0
    engines: int = field(default=1, compare=False)
    nodes: int = field(default=1, compare=False)
    far: bool = field(default=False, compare=False)
    _kept: Kept = field(default_factory=Kept, compare=False, repr=False)

    def offer(self, state: Iterable[tuple[str, torch.Tensor]], step: int, bases: Collection[str]) -> Offered:
        """Packs the weights and makes them fetchable from each of `bases`: digests that engines hold, or "" for
        everything. Without deltas, everything is what all get."""
        start = time.monotonic()
        until = start + self.deadline_s
        if self.delta:
            renewed = self._kept.renew(
                state, step, bases, bucket_bytes=self.bucket_bytes, dense_above=self.dense_above
            )
            ways = tuple(
                (manifest, self._send(manifest, buckets, until)) for manifest, buckets in renewed.ways
            )
            return Offered(dense=renewed.dense, ways=ways, metrics=renewed.metrics)
        manifest, buckets = pack(state, step, self.bucket_bytes)
        metrics = {names.WEIGHTS_GATHER_S: time.monotonic() - start}
        return Offered(
            dense=manifest, ways=((manifest, self._send(manifest, buckets, until)),), metrics=metrics
        )

    def dense(self, step: int) -> tuple[WeightManifest, Ref]:
        """Makes the whole of version `step`, offered last and with deltas, fetchable. Raises `BroadcastError` when
        it is not kept."""
        manifest, buckets = self._kept.dense(step)
        return manifest, self.send(manifest, buckets)

    def send(self, manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]]) -> object:
        return self._send(manifest, buckets, time.monotonic() + self.deadline_s)

    def _send(self, manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]], until: float) -> object:
        name = chosen(self.transport, manifest.total_bytes, self.engines, self.nodes, self.far)
        if name != URL:
            return build(name).send(manifest, buckets)
        left_s = max(0.0, until - time.monotonic())
        there = build(name, url=self.url, timeout_s=self.url_timeout_s, deadline_s=left_s)
        return there.send(manifest, buckets)

    def receive(self, ticket: object, deadline_s: float) -> list[NDArray[np.uint8]]:
        return build(getattr(ticket, "transport", self.transport)).receive(ticket, deadline_s)
