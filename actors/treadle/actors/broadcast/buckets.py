"""Weights as byte buckets: what the learner packs, a transport carries and an engine unpacks.

Letters: B buckets of a version; a bucket is uint8 [bytes]. Tensors lie in a bucket one after another, each at
an aligned offset, and never straddle two buckets; a tensor larger than `bucket_bytes` gets its own bucket.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from treadle.kernels.digest import state_digest
from treadle.platform.errors import BroadcastError
from treadle.platform.records import TensorEntry, WeightManifest, WeightVersion

ALIGNMENT_BYTES = 64  # a cache line, and a multiple of every element size: views need no copy


def pack(
    state: Iterable[tuple[str, torch.Tensor]], step: int, bucket_bytes: int
) -> tuple[WeightManifest, list[NDArray[np.uint8]]]:
    """Copies every tensor once into buckets of at most `bucket_bytes` and returns them with their manifest.

    A tensor is copied before the next one is asked for: a learner that gathers lazily may reuse its memory. The digest
    is that of the copies: of many small tensors, one call takes all.
    Raises `BroadcastError` when a name occurs twice or there is nothing to pack.
    """
    if bucket_bytes < 1:
        raise BroadcastError(f"broadcast.pack: bucket_bytes={bucket_bytes}.", "Set it to at least 1.")
    packer = _Packer(bucket_bytes)
    for name, tensor in state:
        packer.add(name, tensor)
    buckets = packer.close()
    entries = tuple(packer.entries.values())
    manifest = WeightManifest(
        version=WeightVersion(step=step, digest=state_digest(_views(entries, buckets, step))),
        tensors=entries,
        bucket_bytes=tuple(len(bucket) for bucket in buckets),
        bucket_crc32=tuple(zlib.crc32(bucket.data) for bucket in buckets),
    )
    return manifest, buckets


class _Packer:
    """Fills one bucket after another."""

    def __init__(self, bucket_bytes: int) -> None:
        self.entries: dict[str, TensorEntry] = {}
        self._limit = bucket_bytes
        self._full: list[NDArray[np.uint8]] = []
        self._open = np.zeros(0, dtype=np.uint8)
        self._filled = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.entries:
            raise BroadcastError(
                f"broadcast.pack: tensor {name} occurs twice.", "Give every tensor one name."
            )
        raw = tensor.detach().cpu().reshape(-1).contiguous()
        size = raw.numel() * raw.element_size()
        offset = self._reserve(size)
        if size:
            self._open[offset : offset + size] = raw.view(torch.uint8).numpy()
        self.entries[name] = TensorEntry(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            bucket=len(self._full),
            offset_bytes=offset,
            size_bytes=size,
        )

    def close(self) -> list[NDArray[np.uint8]]:
        if not self.entries:
            raise BroadcastError("broadcast.pack: the state has no tensors.", "Publish a model with weights.")
        return [*self._full, self._open[: self._filled]]

    def _reserve(self, size: int) -> int:
        """An aligned offset for `size` bytes, in a new bucket where the open one has no room."""
        offset = -(-self._filled // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if offset + size > len(self._open):
            if self._filled:
                self._full.append(self._open[: self._filled])
            # Zeroed pages cost nothing until touched, and gaps have a defined checksum.
            self._open = np.zeros(max(size, self._limit), dtype=np.uint8)
            offset = 0
        self._filled = offset + size
        return offset


def check(manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]]) -> None:
    """Raises `BroadcastError` naming the bucket and its tensors when number, size or CRC-32 differ."""
    if len(buckets) != len(manifest.bucket_bytes):
        raise _damaged(
            manifest.version.step, f"{len(buckets)} of {len(manifest.bucket_bytes)} buckets arrived"
        )
    for index, bucket in enumerate(buckets):
        if len(bucket) != manifest.bucket_bytes[index]:
            found = f"has {len(bucket)} bytes instead of {manifest.bucket_bytes[index]}"
        elif zlib.crc32(bucket.data) != manifest.bucket_crc32[index]:
            found = "fails its CRC-32"
        else:
            continue
        raise _damaged(manifest.version.step, f"bucket {index} ({_tensors_of(manifest, index)}) {found}")


def unpack(
    manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors as views into `buckets`: no copy, valid as long as the bucket lives, not to be written to.

    Buckets out of a shared-memory store are read-only; torch knows no read-only tensor, writing would crash.
    """
    return _views(manifest.tensors, buckets, manifest.version.step)


def _views(
    entries: Iterable[TensorEntry], buckets: Sequence[NDArray[np.uint8]], step: int
) -> Iterator[tuple[str, torch.Tensor]]:
    # A tensor per bucket and dtype, and views of it: a model of many small tensors costs microseconds for each.
    wholes = [torch.from_numpy(np.asarray(_Window(bucket))) if len(bucket) else None for bucket in buckets]
    typed: dict[tuple[int, str], torch.Tensor] = {}
    for entry in entries:
        dtype: torch.dtype = getattr(torch, entry.dtype)
        whole = wholes[entry.bucket]
        width = dtype.itemsize
        if not (
            math.prod(entry.shape) * width == entry.size_bytes
            and entry.offset_bytes % width == 0
            and entry.offset_bytes + entry.size_bytes <= len(buckets[entry.bucket])
        ):
            raise _damaged(step, f"tensor {entry.name} reaches beyond bucket {entry.bucket}")
        if whole is None or not entry.size_bytes:
            yield entry.name, torch.empty(entry.shape, dtype=dtype)
            continue
        if (key := (entry.bucket, entry.dtype)) not in typed:
            typed[key] = whole[: len(whole) // width * width].view(dtype)
        steps = _steps(tuple(entry.shape))
        yield entry.name, typed[key].as_strided(entry.shape, steps, entry.offset_bytes // width)


@functools.lru_cache(maxsize=1024)
def _steps(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return torch.empty(shape, device="meta").stride()


class _Window:
    """The memory of a read-only array without its flag, which torch cannot express and would warn about.
    `unpack` forbids writing."""

    def __init__(self, owner: NDArray[np.uint8]) -> None:
        self._owner = owner
        address, _ = owner.__array_interface__["data"]
        self.__array_interface__ = {**owner.__array_interface__, "data": (address, False)}


def _tensors_of(manifest: WeightManifest, bucket: int) -> str:
    names = [entry.name for entry in manifest.tensors if entry.bucket == bucket]
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _damaged(step: int, what: str) -> BroadcastError:
    return BroadcastError(
        f"broadcast.check: version {step}: {what}.",
        "Fetch the version again; if it stays damaged, check the node's memory and network.",
    )
