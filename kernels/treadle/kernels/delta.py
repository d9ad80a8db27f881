"""Deltas: only what changed in the weights, losslessly, and proof that it met the right weights.

A delta is made from two versions of the weights, or from one and a map of what changed (`cast_diff`); it is applied
through a plan in one call over all tensors. Nothing is written before everything is known: the whole delta has been
read without a defect, and the digest that the weights will have is the one the sender says. That check costs a look
at the changed elements only, and catches damage in transit as well as weights other than the sender's.

`steps=True` sends changes as differences in ulps, a third of the size of values at usual learning rates, which
needs the old weights on both sides; `steps=False` sends values, which may be applied twice.

Encodings and their choice: csrc/codec.h. Blocks of 65,536 elements each take the smallest.
B blocks.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import treadle.kernels.delta_ops  # noqa: F401  registers the operators
from treadle.kernels.cast_diff import signed_lanes
from treadle.kernels.delta_codec import MISMATCH, OUTSIDE
from treadle.kernels.delta_eager import NONE
from treadle.kernels.digest import Partial
from treadle.kernels.errors import DeltaCorrupt, DeltaMismatch
from treadle.kernels.layout import Layout
from treadle.kernels.plan import Plan

_WORD = 1 << 64
_MAGIC = b"TRDLDLT1"
_HEADER = struct.Struct(
    "<8s16s4QqqqI"
)  # magic, layout, base and digest, blocks, payload bytes, elements, CRC-32
_FIRST_GUESS = 8  # of a payload on a GPU, as a part of the dense size


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What leads from the weights with digest `base` to those with digest `digest`.

    Example: `delta = encode_delta(layout, new, before=old, base=base, digest=digest)`;
    `apply_delta_(Delta.from_bytes(layout, delta.to_bytes()), plan)`.
    """

    layout: Layout
    blocks: Tensor
    """[B] int32: encoding and bytes of each block."""
    payload: Tensor
    """uint8, the blocks one after the other."""
    elements: int
    """Elements that the payload holds."""
    base: Partial
    digest: Partial

    @property
    def nbytes(self) -> int:
        """Size on the wire."""
        return _HEADER.size + 4 * self.blocks.numel() + self.payload.numel()

    @property
    def density(self) -> float:
        """Elements sent over elements there are."""
        return self.elements / max(1, sum(piece.numel for piece in self.layout.pieces))

    def to_bytes(self) -> bytes:
        """The delta with a header and a checksum; waits for the stream that encodes it."""
        body = self.blocks.cpu().numpy().astype("<i4").tobytes() + self.payload.cpu().numpy().tobytes()
        sizes = (self.blocks.numel(), self.payload.numel(), self.elements)
        fields = (_MAGIC, self.layout.fingerprint, *self.base, *self.digest, *sizes)
        crc = zlib.crc32(body, zlib.crc32(_HEADER.pack(*fields, 0)))
        return _HEADER.pack(*fields, crc) + body

    @classmethod
    def from_bytes(cls, layout: Layout, data: bytes | memoryview) -> Delta:
        """Raises `DeltaCorrupt` for anything that `to_bytes` with an equal layout has not written."""
        if len(data) < _HEADER.size:
            raise DeltaCorrupt(f"delta: {len(data)} bytes are less than a header; fetch it again")
        magic, fingerprint, *lanes, blocks, size, elements, crc = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise DeltaCorrupt("delta: these bytes are no delta of this version; check what was fetched")
        if fingerprint != layout.fingerprint or blocks != layout.blocks:
            raise DeltaCorrupt(
                "delta: it was made for another layout; build the layout from the same tensors"
            )
        if size < 0 or len(data) != _HEADER.size + 4 * blocks + size:
            raise DeltaCorrupt(f"delta: {len(data)} bytes, the header says otherwise; fetch it again")
        body = memoryview(data)[_HEADER.size :]
        fields = (magic, fingerprint, *lanes, blocks, size, elements)
        if zlib.crc32(body, zlib.crc32(_HEADER.pack(*fields, 0))) != crc:
            raise DeltaCorrupt("delta: the checksum differs; fetch it again")
        raw = torch.from_numpy(np.frombuffer(bytearray(body), np.uint8))
        return cls(
            layout=layout,
            # The payload's offset in the bytes is a multiple of 4, that of an aligned copy.
            blocks=raw[: 4 * blocks].view(torch.int32),
            payload=raw[4 * blocks :],
            elements=elements,
            base=Partial(*lanes[:2]),
            digest=Partial(*lanes[2:]),
        )

    def to(self, device: torch.device) -> Delta:
        return Delta(
            layout=self.layout,
            blocks=self.blocks.to(device),
            payload=self.payload.to(device),
            elements=self.elements,
            base=self.base,
            digest=self.digest,
        )


def encode_delta(
    layout: Layout,
    current: Sequence[Tensor],
    *,
    before: Sequence[Tensor] = (),
    dirty: Sequence[Tensor] = (),
    steps: bool = True,
    base: Partial,
    digest: Partial,
) -> Delta:
    """What changed from `before` to `current`, or where `dirty` says so.

    current, before: the layout's pieces; dirty: a bitmap [⌈n/32⌉] int32 per piece. Exactly one of the two is given.
    `base` and `digest` are those of all weights before and now. Without `before` there are no steps. The result is
    on the tensors' device; making it waits for the current stream once. Raises `ValueError` for tensors that are
    not the layout's.
    """
    layout.check(current, "encode_delta: current")
    if bool(before) == bool(dirty) and layout.pieces:
        raise ValueError("encode_delta: pass either before= or dirty=")
    if before:
        layout.check(before, "encode_delta: before")
    for piece, bitmap in zip(layout.pieces, dirty, strict=False):
        if bitmap.dtype != torch.int32 or bitmap.numel() != -(-piece.numel // 32):
            raise ValueError(
                f"encode_delta: the bitmap of {piece.name} must be int32 [{-(-piece.numel // 32)}]"
            )
    device = current[0].device if current else torch.device("cpu")
    blocks = torch.zeros(layout.blocks, dtype=torch.int32, device=device)
    payload, elements = _encoded(layout, current, before, dirty, steps, blocks, device)
    return Delta(
        layout=layout,
        blocks=blocks,
        payload=payload,
        elements=elements,
        base=base,
        digest=digest,
    )


def _encoded(
    layout: Layout,
    current: Sequence[Tensor],
    before: Sequence[Tensor],
    dirty: Sequence[Tensor],
    steps: bool,
    blocks: Tensor,
    device: torch.device,
) -> tuple[Tensor, int]:
    """Payload, elements. A GPU is given a part of the dense size first, and what it needs if that was too little."""
    if not current:
        return torch.empty(0, dtype=torch.uint8), 0
    given = (layout.table_on(device), list(current), list(before), list(dirty), steps, blocks)
    total = torch.zeros(2, dtype=torch.int64, device=device)
    if device.type == "cpu":
        # Memory that is not touched costs nothing, and what is too much is given back without a copy.
        room = np.empty(layout.dense_bytes, np.uint8)
        torch.ops.treadle.delta_encode(*given, torch.from_numpy(room), total)
        size, elements = total.tolist()
        room.resize(size, refcheck=False)
        return torch.from_numpy(room), elements
    capacity = layout.dense_bytes // _FIRST_GUESS
    while True:
        payload = torch.empty(-(-capacity // 4) * 4, dtype=torch.uint8, device=device)
        torch.ops.treadle.delta_encode(*given, payload, total)
        size, elements = total.tolist()
        if size <= capacity:
            return payload[:size].clone(), elements
        capacity = size


def check_delta(delta: Delta, plan: Plan) -> Partial:
    """Reads a delta without writing anything: by how much it would change the digest of the elements that `plan`
    places. Summed over all receivers of a model, that is `delta.digest` less `delta.base`.

    Raises `DeltaCorrupt` naming the first damaged block. Waits for the current stream."""
    lanes, verdict = _checked(_arguments(delta, plan), plan)
    _judge(delta, verdict)
    return _unsigned(lanes)


def apply_delta_(delta: Delta, plan: Plan, *, expected: Partial | None = None) -> None:
    """Writes a delta into the plan's tensors, all of it or nothing.

    `expected` is what `check_delta` is to find: by default the change of the whole model's digest, right for a
    receiver that holds every element. One that holds a part passes the change that it and the sender agreed on.
    Raises `DeltaCorrupt` or `DeltaMismatch` before anything is written. Waits for the current stream."""
    if expected is None:
        expected = Partial(*((n - o) % _WORD for n, o in zip(delta.digest, delta.base, strict=True)))
    given = _arguments(delta, plan)
    lanes, verdict = _checked(given, plan)
    wanted = torch.tensor(signed_lanes(expected), dtype=torch.int64).to(plan.device)
    torch.ops.treadle.delta_apply_(*given, plan.destinations, lanes, wanted, verdict)
    _judge(delta, verdict)


def write_delta_(delta: Delta, plan: Plan) -> None:
    """Writes a delta into the plan's tensors without a look at them first: half the work of `apply_delta_`, for weights
    that nobody uses yet, and that are digested afterwards.

    Raises `DeltaCorrupt` for a damaged block; others may then be written. Waits for the current stream."""
    lanes = torch.zeros(2, dtype=torch.int64, device=plan.device)
    verdict = torch.tensor([NONE, 0], dtype=torch.int64).to(plan.device)
    torch.ops.treadle.delta_apply_(*_arguments(delta, plan), plan.destinations, lanes, None, verdict)
    _judge(delta, verdict)


def _arguments(delta: Delta, plan: Plan) -> tuple[Tensor, ...]:
    if delta.layout.fingerprint != plan.layout.fingerprint:
        raise DeltaCorrupt(
            "delta: it was made for another layout than the plan; build both from the same tensors"
        )
    delta = delta.to(plan.device)
    sizes = delta.blocks.to(torch.int64) & ((1 << 28) - 1)
    offsets = torch.cumsum(sizes, 0) - sizes
    return (plan.layout.table_on(plan.device), delta.blocks, offsets, delta.payload, *plan.baked())


def _checked(given: tuple[Tensor, ...], plan: Plan) -> tuple[Tensor, Tensor]:
    lanes = torch.zeros(2, dtype=torch.int64, device=plan.device)
    verdict = torch.tensor([NONE, 0], dtype=torch.int64).to(plan.device)
    if plan.layout.blocks:
        torch.ops.treadle.delta_check(*given, plan.destinations, lanes, verdict)
    return lanes, verdict


def _judge(delta: Delta, verdict: Tensor) -> None:
    found = int(verdict[0])
    if found == NONE:
        return
    if found == MISMATCH:
        raise DeltaMismatch(
            f"delta from {delta.base} to {delta.digest}: these weights would not have that digest after it; "
            "publish all weights to this receiver"
        )
    what = "reaches beyond its tensor" if found % 4 == OUTSIDE else "is damaged"
    raise DeltaCorrupt(
        f"delta from {delta.base} to {delta.digest}: block {found // 4} {what}; fetch it again"
    )


def _unsigned(lanes: Tensor) -> Partial:
    first, second = lanes.tolist()
    return Partial(first % _WORD, second % _WORD)
