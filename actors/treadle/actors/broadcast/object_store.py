"""Buckets through Ray's object store: written once into shared memory, mapped by every engine of the node.

Engines on other nodes pull each bucket once per node, in parallel per bucket; that is why a model is never
one object. The sending process owns the objects: when it dies, a late engine gets an error and not stale
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayError

from treadle.platform.errors import BroadcastError, DeadlineError
from treadle.platform.records import Ref, WeightManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStoreTicket:
    """Where the buckets lie: one reference each. Holding the ticket keeps them alive."""

    step: int
    buckets: tuple[Ref, ...]
    transport: str = "object_store"


class ObjectStoreTransport:
    """Shared memory within a node, Ray's object transfer between nodes."""

    def send(self, manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]]) -> ObjectStoreTicket:
        return ObjectStoreTicket(
            step=manifest.version.step, buckets=tuple(ray.put(bucket) for bucket in buckets)
        )

    def receive(self, ticket: object, deadline_s: float) -> list[NDArray[np.uint8]]:
        """Read-only arrays mapped from shared memory. Raises `DeadlineError`, or `BroadcastError` when the
        sender is gone."""
        if not isinstance(ticket, ObjectStoreTicket):
            raise BroadcastError(f"broadcast.receive: {type(ticket).__name__} is no object-store ticket.")
        try:
            return list(ray.get(list(ticket.buckets), timeout=deadline_s))
        except GetTimeoutError as error:
            raise DeadlineError(
                f"broadcast.receive: version {ticket.step} did not arrive within {deadline_s:g} s.",
                "Raise broadcast.stage_deadline_s, or look for a slow link or a full object store.",
            ) from error
        except RayError as error:
            raise BroadcastError(
                f"broadcast.receive: version {ticket.step} is lost ({type(error).__name__}): "
                "the process that sent it has died.",
                "Publish again from the living learner.",
            ) from error
