"""An engine's second copy of the weights: where a version is built while the one in use goes on drawing.

A dense version is what was fetched, as it lies (in shared memory, if that is how it came). The first delta copies it
into memory of this process; from then on deltas are written into that copy in one call, and its digest is computed
anew from all of its bytes afterwards. That one look finds both a base that was damaged since it was looked at last and
a write that failed: either leaves other bits than the new version's. Nothing here touches the weights in use; what goes
wrong costs the copy at most, and then the next version must come whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from treadle.actors.broadcast.buckets import unpack
from treadle.actors.broadcast.deltas import Buckets, StaleBaseError, decoded, refused
from treadle.kernels.delta import write_delta_
from treadle.kernels.digest import state_digest
from treadle.kernels.errors import DeltaCorrupt
from treadle.kernels.layout import Layout
from treadle.kernels.plan import Plan
from treadle.platform.failpoints import failpoint
from treadle.platform.records import WeightManifest, WeightVersion


class Standby:
    """Holds a version from `put` on: dense bytes, or a delta on what it holds already. One thread at a time."""

    def __init__(self) -> None:
        self._manifest: WeightManifest | None = None
        self._buckets: Buckets = []
        self._views: list[tuple[str, torch.Tensor]] = []
        self._version: WeightVersion | None = None
        self._plan: Plan | None = None  # made with the private copy

    @property
    def version(self) -> WeightVersion | None:
        """What it holds, by the sender's word."""
        return self._version

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views by name, valid until the next `put`; not to be written to."""
        return iter(self._views)

    def put(self, manifest: WeightManifest, buckets: Buckets) -> str:
        """Takes over a version; returns the digest of what is held then.

        Raises `StaleBaseError` for a delta from other weights than these, and for one after which they are not what
        they should be; `BroadcastError` for one that is damaged.
        """
        if manifest.base is not None:
            return self._put_delta(manifest, manifest.base, buckets)
        self.drop()
        self._hold(manifest, buckets)
        self._version = manifest.version
        return state_digest(self.tensors())

    def adopted(self) -> None:
        """The engine took the version over: its bytes are kept only if a delta may follow."""
        if self._manifest is not None and not self._manifest.as_base:
            self.drop()

    def drop(self) -> None:
        """Forgets everything."""
        self._manifest = self._version = self._plan = None
        self._buckets, self._views = [], []

    def _hold(self, manifest: WeightManifest, buckets: Buckets) -> None:
        self._manifest, self._buckets = manifest, buckets
        self._views = list(unpack(manifest, buckets))

    def _put_delta(self, manifest: WeightManifest, base: WeightVersion, buckets: Buckets) -> str:
        if self._version is not None and self._version.digest == manifest.version.digest:
            # Staged before by a call whose answer was lost, or a step that changed nothing.
            self._version = manifest.version
            return state_digest(self.tensors())
        plan = self._base(manifest, base)
        delta = decoded(plan.layout, manifest, buckets)
        try:
            write_delta_(delta, plan)
        except DeltaCorrupt as error:
            self.drop()
            raise StaleBaseError(*refused(manifest, str(error)).args) from error
        if failpoint("broadcast.lost_write"):
            self._flip_one_bit()
        digest = state_digest(self.tensors())
        if digest != manifest.version.digest:
            self.drop()
            raise StaleBaseError(
                f"broadcast.stage: version {manifest.version.step} has digest {digest} instead of "
                f"{manifest.version.digest} when written onto version {base.step}: its base or a write is damaged.",
                "Fetch the version dense; if it happens again, check the node's memory.",
            )
        self._version = manifest.version
        return digest

    def _base(self, manifest: WeightManifest, base: WeightVersion) -> Plan:
        """The plan into this process's own copy of the base."""
        held = "nothing" if self._version is None else f"version {self._version.step}, {self._version.digest}"
        if self._version is None or self._version.digest != base.digest:
            raise StaleBaseError(
                f"broadcast.stage: version {manifest.version.step} comes as a delta from version {base.step}, "
                f"{base.digest}; the engine holds {held}.",
                "Fetch the version dense.",
            )
        plan = self._private()
        if failpoint("broadcast.stale_base"):
            self._flip_one_bit()
        return plan

    def _private(self) -> Plan:
        if self._plan is None:
            assert self._manifest is not None
            self._hold(self._manifest, [bucket.copy() for bucket in self._buckets])
            self._plan = Plan.direct(Layout.of(self._views), self._views)
        return self._plan

    def _flip_one_bit(self) -> None:
        assert self._manifest is not None
        entry = max(self._manifest.tensors, key=lambda entry: entry.size_bytes)
        self._buckets[entry.bucket][entry.offset_bytes + entry.size_bytes // 2] ^= 1
