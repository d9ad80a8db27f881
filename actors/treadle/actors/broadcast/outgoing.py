"""What the learner's rank 0 is handed to publish with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from treadle.actors.broadcast.buckets import pack
from treadle.actors.broadcast.transports import build
from treadle.platform.records import WeightManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A transport by name and the size of its buckets: small enough to travel with every call.

    Keeps `contracts.Transport`. Example, in the rank that has the full weights:
    `manifest, ticket = outgoing.offer(backend.full_state(), step)`.
    """

    transport: str
    bucket_bytes: int

    def offer(self, state: Iterable[tuple[str, torch.Tensor]], step: int) -> tuple[WeightManifest, object]:
        """Packs the weights and makes them fetchable."""
        manifest, buckets = pack(state, step, self.bucket_bytes)
        return manifest, self.send(manifest, buckets)

    def send(self, manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]]) -> object:
        return build(self.transport).send(manifest, buckets)

    def receive(self, ticket: object, deadline_s: float) -> list[NDArray[np.uint8]]:
        return build(self.transport).receive(ticket, deadline_s)
