"""The transports by name, and the one way to fetch from any of them.

A transport is one file with a class that keeps `contracts.Transport` and a ticket that names it in
`transport`; its line in `TRANSPORTS` makes it a value of `broadcast.transport`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treadle.actors.broadcast.buckets import check
from treadle.platform.contracts import Transport
from treadle.platform.errors import BroadcastError, ConfigError
from treadle.platform.failpoints import failpoint
from treadle.platform.records import WeightManifest

# Imported on use: settings are checked before ray is imported.
TRANSPORTS: dict[str, str] = {
    "object_store": "treadle.actors.broadcast.object_store:ObjectStoreTransport",
    "gloo": "treadle.actors.broadcast.gloo:GlooTransport",
    "chain": "treadle.actors.broadcast.chain:ChainTransport",
    "url": "treadle.actors.broadcast.url:UrlTransport",
}

AUTO, URL = "auto", "url"
CHAIN_ABOVE_BYTES = 64 * 2**20
CHAIN_ABOVE_NODES = 2
REGION = "ray.io/availability-region"


class Ticket(Protocol):
    """What every transport's ticket has."""

    transport: str


def build(name: str, **settings: object) -> Transport:
    """The transport of that name, with settings of its own. Raises `ConfigError` for an unknown name. Example:
    `build("object_store")`."""
    check_name(name)
    module, _, attribute = TRANSPORTS[name].partition(":")
    transport: Transport = getattr(importlib.import_module(module), attribute)(**settings)
    return transport


def check_name(name: str) -> None:
    """Raises `ConfigError` for an unknown name."""
    if name not in TRANSPORTS:
        raise ConfigError(
            f"broadcast.transport={name!r} is unknown.", f"Choose one of: {', '.join(sorted(TRANSPORTS))}."
        )


def chosen(name: str, total_bytes: int, engines: int, nodes: int, far: bool = False) -> str:
    """The transport that `name` stands for: of "auto", the URL where nodes are `far` from each other; chains for what
    is large and goes to several nodes, where the learner's link is the limit; otherwise the object store, which maps
    shared memory within a node."""
    if name != AUTO:
        return name
    if far:
        return URL
    many = min(engines, nodes) > CHAIN_ABOVE_NODES
    return "chain" if many and total_bytes > CHAIN_ABOVE_BYTES else "object_store"


def spread(labels: Iterable[Mapping[str, str]]) -> bool:
    """Whether nodes with these labels are in several regions; one that names none is near all others."""
    return len({label[REGION] for label in labels if label.get(REGION)}) > 1


def fetch(manifest: WeightManifest, ticket: object, deadline_s: float) -> list[NDArray[np.uint8]]:
    """The version's buckets, checked against the manifest. Raises `BroadcastError` naming the damaged bucket,
    or `DeadlineError`."""
    name = getattr(ticket, "transport", "")
    if name not in TRANSPORTS:
        raise BroadcastError(f"broadcast.receive: {type(ticket).__name__} names no known transport.")
    buckets = build(name).receive(ticket, deadline_s)
    if failpoint("broadcast.in_transit"):
        buckets = [_one_bit_flipped(buckets[0]), *buckets[1:]]
    if failpoint("broadcast.truncated"):
        buckets = [*buckets[:-1], buckets[-1][: len(buckets[-1]) // 2]]
    check(manifest, buckets)
    return buckets


def _one_bit_flipped(bucket: NDArray[np.uint8]) -> NDArray[np.uint8]:
    damaged = bucket.copy()
    damaged[len(damaged) // 2] ^= 1
    return damaged
