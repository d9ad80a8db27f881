"""What the publishing process remembers of earlier versions, so that only changes need to travel.

It keeps the newest version's bytes, once: the next version is compared with them ("pair mode"), and an engine that
needs everything is served from them. That is the memory of one model in its published dtype, and two while a version
is being made. Beside it lie maps of what the last `MAPS` versions changed, one bit per element each: an engine that
missed some gets one delta of all elements marked in any map since its version, with their present values.

Why pairs and not `kernels.cast_diff`, which finds the changes inside the optimizer's copy from fp32 to bf16 and needs
no second copy of the weights: DeepSpeed makes that copy within its own `step`, one line over a rank's slice of a flat,
padded buffer (ZeRO-1 and 2: `bit16_partitions[rank].data.copy_(fp32_partition)`, the all-gather right after it; ZeRO-3:
partitions of every parameter), and calls nothing between the old bits and the new. A map would exist in pieces on all
ranks, in coordinates that no receiver knows, and would have to be gathered like the weights. An fp32 learner has no
such copy at all. And the old bytes are worth their memory: with them changes travel as differences in ulps, a third of
the size of values, and an engine can be given the whole version while the learner is already changing the next one.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from treadle.actors.broadcast.buckets import pack
from treadle.actors.broadcast.deltas import (
    Buckets,
    Map,
    Version,
    changes,
    densities,
    density,
    encoded,
    merged,
)
from treadle.kernels.layout import Layout
from treadle.platform import metric_names as names
from treadle.platform.errors import BroadcastError
from treadle.platform.records import WeightManifest, WeightVersion

_log = logging.getLogger(__name__)

MAPS = 8
"""Versions an engine may be behind and still be served a delta. At bf16 their maps are half a model of memory."""

Way = tuple[WeightManifest, Buckets]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """`map` is what changed from `base` to the version after it."""

    base: WeightVersion
    map: Map


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    """A version that was taken over: its dense manifest, how to reach it, and figures by metric name."""

    dense: WeightManifest
    ways: list[Way]
    metrics: dict[str, float]


class Kept:
    """One publishing process's memory. It travels empty: a copy in another process starts anew.

    `renew` is called by one thread; `dense` by any, also meanwhile.
    """

    def __init__(self) -> None:
        self._newest: Version | None = None
        self._changes: deque[_Change] = deque(maxlen=MAPS)

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def renew(
        self,
        state: Iterable[tuple[str, torch.Tensor]],
        step: int,
        bases: Collection[str],
        *,
        bucket_bytes: int,
        dense_above: float,
    ) -> Renewed:
        """Takes over version `step`, and says how to reach it from each of the digests `bases` ("": from nothing).

        A base gets a delta where one is possible, where at most the share `dense_above` of the elements changed, and
        where it is smaller; all others get the dense version. Densities are left out for a first version, and for one
        of another model. Raises `BroadcastError` when a name occurs twice or there is nothing to pack.
        """
        start = time.monotonic()
        watched = _Watched(state)
        manifest, buckets = pack(watched, step, bucket_bytes)
        now = _version(replace(manifest, as_base=True), buckets)
        before, self._newest = self._newest, now
        found = self._compared(before, now)
        deltas = [self._delta(base, before, now, bucket_bytes, dense_above) for base in sorted(bases) if base]
        ways = [way for way in deltas if way is not None]
        if len(ways) < len(bases):
            ways.append(self.dense(step))
        spent = time.monotonic() - start - watched.waited_s
        metrics = {**found, names.WEIGHTS_GATHER_S: watched.waited_s, names.WEIGHTS_ENCODE_S: spent}
        return Renewed(dense=now.manifest, ways=ways, metrics=metrics)

    def dense(self, step: int) -> Way:
        """Version `step` whole. Raises `BroadcastError` when it is not the newest."""
        newest = self._newest
        if newest is None or step != newest.manifest.version.step:
            held = "none" if newest is None else str(newest.manifest.version.step)
            raise BroadcastError(
                f"broadcast.dense: version {step} is asked for, the learner's newest is {held}.",
                "Publish again from the living learner.",
            )
        return newest.manifest, newest.buckets

    def _compared(self, before: Version | None, now: Version) -> dict[str, float]:
        if before is None or not now.layout.pieces or before.layout.fingerprint != now.layout.fingerprint:
            self._changes.clear()
            return {}
        changed = changes(before, now)
        if before.digest != now.digest:
            self._changes.append(_Change(base=before.manifest.version, map=changed))
        return densities(now.layout, changed)

    def _delta(
        self, base: str, before: Version | None, now: Version, bucket_bytes: int, dense_above: float
    ) -> Way | None:
        """None where the dense version is the better way, or the only one."""
        if before is not None and before.digest == base == now.digest:  # a step that changed nothing
            return encoded(now, before.manifest.version, bucket_bytes, before=before, changed=())
        since = [index for index, change in enumerate(self._changes) if change.base.digest == base]
        if not since:
            return None
        missed = list(self._changes)[since[-1] :]
        changed = merged([change.map for change in missed])
        if density(now.layout, changed) > dense_above:
            return None
        start = missed[0].base
        pair = before if before is not None and before.digest == base else None
        way = encoded(now, start, bucket_bytes, before=pair, changed=changed)
        return way if way[0].total_bytes < now.manifest.total_bytes else None


def _version(manifest: WeightManifest, buckets: Buckets) -> Version:
    try:
        return Version.of(manifest, buckets)
    except ValueError as error:
        _log.warning("broadcast.delta: this model is published dense: %s", error)
        return Version(manifest=manifest, buckets=buckets, tensors=(), layout=Layout([]))


class _Watched:
    """A state that notes how long its owner takes to hand out the tensors."""

    def __init__(self, state: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.waited_s = 0.0
        self._state = state

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = iter(self._state)
        while True:
            start = time.monotonic()
            found = next(tensors, None)
            self.waited_s += time.monotonic() - start
            if found is None:
                return
            yield found
