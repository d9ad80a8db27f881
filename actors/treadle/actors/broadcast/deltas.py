"""Deltas on the way: what changed between two packed versions as checked buckets, and back again.

The elements are compared, encoded and applied in the coordinates of `kernels.layout`: the manifest's tensors in
their order, each flattened. A delta travels as one run of bytes (`kernels.delta.Delta.to_bytes`), cut into buckets
like any version, so that every transport carries it and every bucket has its checksum.

T tensors of a version; n elements of one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle.actors.broadcast.buckets import unpack
from treadle.kernels.delta import Delta, encode_delta
from treadle.kernels.digest import Partial
from treadle.kernels.errors import DeltaCorrupt
from treadle.kernels.layout import INTEGERS, Layout
from treadle.platform import metric_names as names
from treadle.platform.errors import BroadcastError
from treadle.platform.records import WeightManifest, WeightVersion

Buckets = list[NDArray[np.uint8]]
Map = tuple[Tensor, ...]
"""What changed: T bitmaps [⌈n/32⌉] int32, bit i % 32 of word i // 32 for element i."""

_CLASSES = (
    (names.WEIGHTS_DENSITY_NORM, ("norm", "ln_", "layernorm")),
    (names.WEIGHTS_DENSITY_EMBEDDING, ("embed", "wte", "wpe")),
    (names.WEIGHTS_DENSITY_HEAD, ("lm_head", "output.weight", "score")),
    (names.WEIGHTS_DENSITY_ATTENTION, ("attn", "attention", "q_proj", "k_proj", "v_proj", "o_proj")),
    (
        names.WEIGHTS_DENSITY_MLP,
        ("mlp", "experts", "feed_forward", "moe", "gate_proj", "up_proj", "down_proj"),
    ),
)


class StaleBaseError(BroadcastError):
    """The weights that a delta starts from are not there, or no longer: only the dense version helps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A version's bytes with their manifest; whoever holds it may read and not write. `tensors` are T views."""

    manifest: WeightManifest
    buckets: Buckets
    tensors: tuple[Tensor, ...]
    layout: Layout

    @classmethod
    def of(cls, manifest: WeightManifest, buckets: Buckets) -> Version:
        """Raises `ValueError` for a tensor whose dtype has no delta encoding."""
        named = list(unpack(manifest, buckets))
        tensors = tuple(tensor for _, tensor in named)
        return cls(manifest=manifest, buckets=buckets, tensors=tensors, layout=Layout.of(named))

    @property
    def digest(self) -> str:
        return self.manifest.version.digest


def changes(before: Version, now: Version) -> Map:
    """The elements whose bits differ, tensor by tensor: numpy's comparison and packing run at the speed of memory.

    Both versions have the same layout.
    """
    return tuple(_differing(old, new) for old, new in zip(before.tensors, now.tensors, strict=True))


def merged(maps: Sequence[Map]) -> Map:
    """The elements that changed in any of the maps, of which there is at least one. An element that changed and
    changed back is in it: harmless, since values and not differences are sent for it."""
    first, *others = maps
    union = [bitmap.clone() for bitmap in first]
    for other in others:
        for bitmap, more in zip(union, other, strict=True):
            bitmap.bitwise_or_(more)
    return tuple(union)


def density(layout: Layout, changed: Map) -> float:
    """Changed elements over elements."""
    return _ones(changed) / max(1, sum(piece.numel for piece in layout.pieces))


def densities(layout: Layout, changed: Map) -> dict[str, float]:
    """The density of everything and of each class of tensors the model has, by metric name."""
    ones: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for piece, bitmap in zip(layout.pieces, changed, strict=True):
        kind = class_of(piece.name)
        ones[kind] = ones.get(kind, 0) + _ones([bitmap])
        sizes[kind] = sizes.get(kind, 0) + piece.numel
    found = {kind: ones[kind] / max(1, size) for kind, size in sizes.items()}
    return {names.WEIGHTS_DENSITY: density(layout, changed), **found}


def class_of(name: str) -> str:
    """The density metric that a tensor of this name counts for: the first class whose words it contains."""
    lowered = name.lower()
    for metric, words in _CLASSES:
        if any(word in lowered for word in words):
            return metric
    return names.WEIGHTS_DENSITY_OTHER


def encoded(
    now: Version, base: WeightVersion, bucket_bytes: int, *, before: Version | None, changed: Map
) -> tuple[WeightManifest, Buckets]:
    """The way from `base` to `now` as a manifest and buckets of at most `bucket_bytes`.

    With `before`, the weights of `base`, changes travel as differences in ulps, a third of the size; without, the
    present values of all `changed` elements.
    """
    delta = encode_delta(
        now.layout,
        now.tensors,
        before=() if before is None else before.tensors,
        dirty=changed if before is None else (),
        base=Partial.parse(base.digest),
        digest=Partial.parse(now.digest),
    )
    data = np.frombuffer(bytearray(delta.to_bytes()), np.uint8)  # writable, as torch wants what it sends
    buckets = [data[start : start + bucket_bytes] for start in range(0, len(data), bucket_bytes)]
    manifest = WeightManifest(
        version=now.manifest.version,
        tensors=(),
        bucket_bytes=tuple(len(bucket) for bucket in buckets),
        bucket_crc32=tuple(zlib.crc32(bucket.data) for bucket in buckets),
        base=base,
        as_base=True,
    )
    return manifest, buckets


def decoded(layout: Layout, manifest: WeightManifest, buckets: Buckets) -> Delta:
    """Raises `BroadcastError` for bytes that are no delta between the manifest's two versions."""
    assert manifest.base is not None
    try:
        delta = Delta.from_bytes(layout, np.concatenate(buckets).data)
    except DeltaCorrupt as error:
        raise refused(manifest, str(error)) from error
    ends = (str(delta.base), str(delta.digest))
    if ends != (manifest.base.digest, manifest.version.digest):
        raise refused(manifest, f"the delta leads from {ends[0]} to {ends[1]}")
    return delta


def refused(manifest: WeightManifest, what: str) -> BroadcastError:
    return BroadcastError(
        f"broadcast.stage: version {manifest.version.step}: {what}.",
        "Fetch it again, then dense; if it stays so, check the node's memory and network.",
    )


def _differing(old: Tensor, new: Tensor) -> Tensor:
    width = INTEGERS[old.element_size()]
    bits = np.packbits(_bits(old, width) != _bits(new, width), bitorder="little")
    words = np.zeros(-(-old.numel() // 32) * 4, dtype=np.uint8)
    words[: len(bits)] = bits
    return torch.from_numpy(words.view(np.int32))


def _bits(tensor: Tensor, width: torch.dtype) -> NDArray[np.generic]:
    array: NDArray[np.generic] = tensor.reshape(-1).view(width).numpy()
    return array


def _ones(bitmaps: Iterable[Tensor]) -> int:
    return sum(
        int(np.bitwise_count(bitmap.numpy().view(np.uint32)).sum(dtype=np.int64)) for bitmap in bitmaps
    )
