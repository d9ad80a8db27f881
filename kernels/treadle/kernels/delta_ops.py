"""The operators behind `delta`: encode, check, apply. Each runs in a compiled library, or in its eager twin.

P pieces, B blocks, R rectangles. On CUDA everything is enqueued on the current stream, and nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treadle.kernels import native
from treadle.kernels.delta_eager import apply_eager, check_eager, encode_eager
from treadle.kernels.native import addresses
from treadle.kernels.registry import op, writes_only


@op(
    "delta_encode(Tensor table, Tensor[] current, Tensor[] before, Tensor[] dirty, bool steps, Tensor(a!) blocks, "
    "Tensor(b!) payload, Tensor(c!) total) -> ()",
    fake=writes_only,
)
def _delta_encode(
    table: Tensor,
    current: Sequence[Tensor],
    before: Sequence[Tensor],
    dirty: Sequence[Tensor],
    steps: bool,
    blocks: Tensor,
    payload: Tensor,
    total: Tensor,
) -> None:
    """Either `before` or `dirty` has P tensors, the other none. Writes `blocks` [B] int32, `payload` uint8, `total`
    [2] int64: bytes and elements. Where the bytes exceed the payload's, it is not valid."""
    library = native.library(total.device)
    if not library:
        encode_eager(table, current, before, dirty, steps, blocks, payload, total)
        return
    words = library.delta_scratch_bytes(blocks.numel()) // 8
    scratch = torch.empty(words, dtype=torch.int64, device=total.device)
    library.call(
        "delta_encode",
        *(table, addresses(total.device, current, before, dirty), len(current), blocks.numel(), int(steps)),
        *(blocks, payload, payload.numel(), total, scratch),
        device=total.device,
    )


@op(
    "delta_check(Tensor table, Tensor blocks, Tensor offsets, Tensor payload, Tensor rectangles, Tensor first, "
    "Tensor[] destinations, Tensor(a!) lanes, Tensor(b!) verdict) -> ()",
    fake=writes_only,
)
def _delta_check(
    table: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    payload: Tensor,
    rectangles: Tensor,
    first: Tensor,
    destinations: Sequence[Tensor],
    lanes: Tensor,
    verdict: Tensor,
) -> None:
    """Looks at everything and writes only `lanes` [2] and `verdict` [2] int64: adds the change of the digest, notes
    the first defect, and adds the payload's elements to verdict[1].

    `blocks` [B] int32, `offsets` [B] int64, `rectangles` [R, 9] int64 (csrc/abi.h), those of piece p from
    `first`[p] up to `first`[p + 1]."""
    library = native.library(lanes.device)
    if not library:
        check_eager(table, blocks, offsets, payload, rectangles, first, destinations, lanes, verdict)
        return
    library.call(
        "delta_check",
        *(table, table.shape[0], blocks.numel(), blocks, offsets, payload, payload.numel()),
        *(rectangles, first, addresses(lanes.device, destinations), lanes, verdict),
        device=lanes.device,
    )


@op(
    "delta_apply_(Tensor table, Tensor blocks, Tensor offsets, Tensor payload, Tensor rectangles, Tensor first, "
    "Tensor(a!)[] destinations, Tensor lanes, Tensor? expected, Tensor(b!) verdict) -> ()",
    fake=writes_only,
)
def _delta_apply(
    table: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    payload: Tensor,
    rectangles: Tensor,
    first: Tensor,
    destinations: Sequence[Tensor],
    lanes: Tensor,
    expected: Tensor | None,
    verdict: Tensor,
) -> None:
    """Writes the destinations, unless the check before it (same arguments, `lanes` and `verdict` as it left them)
    found a defect, or its lanes differ from `expected` [2]: then verdict[0] becomes MISMATCH."""
    library = native.library(lanes.device)
    if not library:
        given = (table, blocks, offsets, payload, rectangles, first, destinations)
        apply_eager(*given, lanes, expected, verdict)
        return
    library.call(
        "delta_apply",
        *(table, table.shape[0], blocks.numel(), blocks, offsets, payload, payload.numel()),
        *(rectangles, first, addresses(lanes.device, destinations), lanes, expected, verdict),
        device=lanes.device,
    )
