"""What each kernel is given, and what its twin makes of the same: fresh random data, outputs that can be poisoned.

n is the number of elements; inputs are drawn on the CPU, with special values among them, and copied to the device.
Element 0 of the first input is 1.5 in every case: a twin that is given another sign there must be found out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.kernels.cast_diff import CastDiff, cast_diff_eager
from treadle.kernels.delta import Delta, encode_delta
from treadle.kernels.delta_eager import apply_eager, encode_eager
from treadle.kernels.digest import Partial, digest_pieces_eager, table_of
from treadle.kernels.layout import Layout
from treadle.kernels.moe import combine_eager, moe_permute, route
from treadle.kernels.pack import Form, Packing
from treadle.kernels.pack_eager import pack_eager, unpack_eager
from treadle.kernels.plan import Plan
from treadle.kernels.reduce import reduce_eager
from treadle.kernels.streamed_mm import ALL_CAME, streamed_mm_eager

POISON = 0xA5
DENSITY = 0.017  # of changes, as Adam makes them at a learning rate of 1e-6
SECTOR_BYTES = 32  # what a GPU's memory moves at least
HIDDEN = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One kernel with its data on a device."""

    inputs: list[Tensor]
    """On the CPU; what the twin is given."""
    reset: Callable[[], object]
    """Poisons what the kernel writes, and puts back what it changes in place."""
    run: Callable[[], object]
    """One call on the current stream."""
    outputs: Callable[[], Sequence[Tensor]]
    twin: Callable[[list[Tensor]], Sequence[Tensor]]
    """The outputs for such inputs, in torch operations on the CPU."""
    moved_bytes: int
    """What must be read and written at least; for scattered writes whole sectors."""


def drawn(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[n] normal numbers; every 97th is special, element 0 is 1.5."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=g)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-42, 3.4e38, 448.0])
    at = torch.arange(96, n, 97)
    values[at] = special[torch.randint(0, len(special), (len(at),), generator=g)]
    values[0] = 1.5
    return values.to(dtype)


def stepped(old: Tensor, seed: int) -> Tensor:
    """A copy in which a share `DENSITY` of the elements, element 0 among them, is one ulp away."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(old), generator=g) < DENSITY
    mask[0] = True
    step = torch.where(torch.rand(len(old), generator=g) < 0.5, 1, -1).to(torch.int16)
    return (old.view(torch.int16) + torch.where(mask, step, 0).to(torch.int16)).view(old.dtype)


def parts(flat: Tensor) -> list[Tensor]:
    """Two tensors, the second at an odd address."""
    cut = len(flat) // 3 * 2 + 1
    return [flat[:cut], flat[cut:]]


def poison(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(POISON)


def one_nan(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies whose NaNs have the same bits: a product's are the processor's choice."""
    return [torch.where(t.isnan(), torch.nan, t) for t in tensors]


def digest(n: int, seed: int, device: torch.device) -> Work:
    """All pieces in one call: reads every byte."""
    inputs = parts(drawn(n, seed, torch.bfloat16))
    held, found = [t.to(device, copy=True) for t in inputs], torch.zeros(2, dtype=torch.int64, device=device)
    table, blocks = table_of((str(i), t.dtype, t.numel(), 7) for i, t in enumerate(inputs))
    on = table.to(device)
    return Work(
        inputs=inputs,
        reset=lambda: poison(found),
        run=lambda: found.copy_(torch.ops.treadle.digest_pieces(on, held, blocks)),
        outputs=lambda: [found],
        twin=lambda given: [digest_pieces_eager(table, given)],
        moved_bytes=2 * n,
    )


def cast_diff(n: int, seed: int, device: torch.device) -> Work:
    """Reads masters and parameters; writes what changed, by whole sectors, and the bitmap."""
    new = stepped(drawn(n, seed, torch.bfloat16), seed + 1)
    masters, old = parts(new.float()), parts(drawn(n, seed, torch.bfloat16))
    layout = Layout.of((str(i), t) for i, t in enumerate(old))
    cast = CastDiff(
        layout, [t.to(device, copy=True) for t in masters], [t.to(device, copy=True) for t in old]
    )

    def reset() -> None:
        cast.clear()
        for parameter, before in zip(cast.parameters, old, strict=True):
            parameter.copy_(before)

    def twin(given: list[Tensor]) -> Sequence[Tensor]:
        mine = CastDiff(layout, given, [t.clone() for t in old])
        cast_diff_eager(layout.table, mine.masters, mine.parameters, mine.dirty, mine._lanes, mine._changed)
        return [*mine.parameters, *mine.dirty, mine._lanes, mine._changed]

    return Work(
        inputs=masters,
        reset=reset,
        run=cast.step,
        outputs=lambda: [*cast.parameters, *cast.dirty, cast._lanes, cast._changed],
        twin=twin,
        moved_bytes=int(6 * n + n / 8 + DENSITY * n * SECTOR_BYTES),
    )


def delta_encode(n: int, seed: int, device: torch.device) -> Work:
    """Reads both versions; what it writes is small."""
    before = parts(drawn(n, seed, torch.bfloat16))
    current = parts(stepped(torch.cat(before), seed + 1))
    layout = Layout.of((str(i), t) for i, t in enumerate(before))
    held, old = [t.to(device, copy=True) for t in current], [t.to(device, copy=True) for t in before]
    table = layout.table.to(device)
    blocks, payload, total = _encoded_room(layout, device)

    def twin(given: list[Tensor]) -> Sequence[Tensor]:
        room = _encoded_room(layout, torch.device("cpu"))
        encode_eager(layout.table, given, before, [], True, *room)
        return [room[0], room[1][: int(room[2][0])], room[2]]

    return Work(
        inputs=current,
        reset=lambda: (poison(blocks, payload), total.zero_()),
        run=lambda: torch.ops.treadle.delta_encode(table, held, old, [], True, blocks, payload, total),
        outputs=lambda: [blocks, payload[: int(total[0])], total],
        twin=twin,
        moved_bytes=4 * n,
    )


def _encoded_room(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    blocks = torch.zeros(layout.blocks, dtype=torch.int32, device=device)
    payload = torch.zeros(-(-layout.dense_bytes // 4) * 4, dtype=torch.uint8, device=device)
    return blocks, payload, torch.zeros(2, dtype=torch.int64, device=device)


def delta_apply(n: int, seed: int, device: torch.device) -> Work:
    """Changes scattered elements through a plan that transposes: a sector read and written for each."""
    rows = n // HIDDEN
    old = drawn(rows * HIDDEN, seed, torch.bfloat16)
    new = stepped(old, seed + 1)
    layout = Layout.of([("w", old)])
    none = Partial(0, 0)
    delta = encode_delta(layout, [new], before=[old], base=none, digest=none)
    moved = old.view(rows, HIDDEN).t().contiguous()
    target = moved.to(device, copy=True)
    given = _apply_arguments(layout, delta, target)

    def twin(inputs: list[Tensor]) -> Sequence[Tensor]:
        mine = inputs[0].clone()
        apply_eager(*_apply_arguments(layout, delta, mine))
        return [mine]

    return Work(
        inputs=[moved],
        reset=lambda: target.copy_(moved),
        run=lambda: torch.ops.treadle.delta_apply_(*given),
        outputs=lambda: [target],
        twin=twin,
        moved_bytes=delta.nbytes + 2 * SECTOR_BYTES * delta.elements,
    )


def _apply_arguments(layout: Layout, delta: Delta, target: Tensor) -> tuple[object, ...]:
    plan, there = Plan(layout), delta.to(target.device)
    plan.place("w", target.t(), of=(target.shape[1], target.shape[0]))
    sizes = there.blocks.to(torch.int64) & ((1 << 28) - 1)
    verdict = torch.tensor([2**63 - 1, 0]).to(target.device)
    lanes = torch.zeros(2, dtype=torch.int64, device=target.device)
    head = (layout.table_on(target.device), there.blocks, sizes.cumsum(0) - sizes, there.payload)
    return (*head, *plan.baked(), plan.destinations, lanes, None, verdict)


def pack(form: Form, dtype: torch.dtype) -> Callable[[int, int, torch.device], Work]:
    """Reads the tensors, writes the bucket."""

    def prepare(n: int, seed: int, device: torch.device) -> Work:
        inputs = [t.view(-1, HIDDEN // 2 + 3) for t in _matrices(n, seed, dtype)]
        held = [t.to(device, copy=True) for t in inputs]
        packing = Packing(inputs, form=form)
        bucket, scales, flags = packing.buffers(device)

        def reset() -> None:
            poison(bucket, scales)
            flags.zero_()

        def twin(given: list[Tensor]) -> Sequence[Tensor]:
            mine, found = packing.buffers(torch.device("cpu"))[:2]
            poison(mine, found)
            pack_eager(packing.segments, given, packing.form, mine, found)
            return [mine, found, torch.ones(packing.chunks, dtype=torch.int32)]

        return Work(
            inputs=inputs,
            reset=reset,
            run=lambda: packing.pack_(held, bucket, scales, flags, epoch=1),
            outputs=lambda: [bucket, scales, flags],
            twin=twin,
            moved_bytes=sum(t.nbytes for t in inputs) + packing.bucket_bytes,
        )

    return prepare


def _matrices(n: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    cols = HIDDEN // 2 + 3
    rows = max(3, n // cols)
    flat = drawn(rows * cols, seed, dtype)
    return [flat[: rows // 3 * cols], flat[rows // 3 * cols :]]


def unpack(n: int, seed: int, device: torch.device) -> Work:
    """fp8 back to bf16: reads codes, writes twice as much."""
    inputs = [t.view(-1, HIDDEN // 2 + 3) for t in _matrices(n, seed, torch.bfloat16)]
    packing = Packing(inputs, form="fp8")
    bucket, scales, flags = packing.buffers(torch.device("cpu"))
    packing.pack_(inputs, bucket, scales, flags, epoch=1)
    there, factors = bucket.to(device), scales.to(device)
    targets = [torch.empty_like(t, device=device) for t in inputs]

    def twin(given: list[Tensor]) -> Sequence[Tensor]:
        mine = [torch.empty_like(t) for t in inputs]
        unpack_eager(packing.segments, mine, packing.form, given[0], given[1])
        return one_nan(mine)

    return Work(
        inputs=[bucket, scales],
        reset=lambda: poison(*targets),
        run=lambda: packing.unpack_(targets, there, factors),
        outputs=lambda: one_nan(targets),
        twin=twin,
        moved_bytes=3 * sum(t.numel() for t in inputs),
    )


def reduce(n: int, seed: int, device: torch.device) -> Work:
    """Reads four tensors, writes one."""
    inputs = [drawn(n, seed + i, torch.bfloat16) for i in range(4)]
    held, out = [t.to(device, copy=True) for t in inputs], torch.empty(n, dtype=torch.bfloat16, device=device)
    return Work(
        inputs=inputs,
        reset=lambda: poison(out),
        run=lambda: torch.ops.treadle.reduce_(held, out),
        outputs=lambda: [out],
        twin=lambda given: [reduce_eager(given)],
        moved_bytes=10 * n,
    )


def moe(n: int, seed: int, device: torch.device) -> Work:
    """Rows to their experts and back: reads and writes them K times, and then reads K and writes one."""
    tokens, choices = max(2, n // HIDDEN), 4
    hidden = drawn(tokens * HIDDEN, seed, torch.bfloat16).view(tokens, HIDDEN)
    g = torch.Generator().manual_seed(seed + 1)
    expert_of = torch.randint(0, 16, (tokens, choices), generator=g)
    weights = torch.rand(tokens, choices, generator=g)
    routing, mine = route(expert_of, experts=16), route(expert_of.to(device), experts=16)
    held, factors, out = hidden.to(device), weights.to(device), torch.empty_like(hidden, device=device)

    def run() -> None:
        torch.ops.treadle.combine_rows_(moe_permute(held, mine), mine.row_of, factors, out)

    def twin(given: list[Tensor]) -> Sequence[Tensor]:
        rows = given[0].new_zeros(routing.rows, HIDDEN)
        rows[routing.row_of.reshape(-1).long()] = given[0].repeat_interleave(choices, 0)
        return [combine_eager(rows, routing.row_of, weights)]

    return Work(
        inputs=[hidden],
        reset=lambda: poison(out),
        run=run,
        outputs=lambda: [out],
        twin=twin,
        moved_bytes=2 * tokens * HIDDEN * (3 * choices + 1),
    )


def streamed_mm(n: int, seed: int, device: torch.device) -> Work:
    """A product of whole numbers (element 0 is 1.5), whose sums are exact in any order, with all rows there."""
    rows, inner, cols = max(2, n // HIDDEN), 512, 256
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-8, 9, shape, generator=g).bfloat16() for shape in ((rows, inner), (inner, cols)))
    a[0, 0], b[0, 0] = 1.5, 1.0
    out = torch.empty(rows, cols, dtype=torch.bfloat16, device=device)
    ready = torch.ones(-(-rows // 64), dtype=torch.int32, device=device)
    verdict = torch.tensor([ALL_CAME]).to(device)
    held = (a.to(device, copy=True), b.to(device, copy=True), ready, 1, 64, 10**7, out, verdict)

    def twin(given: list[Tensor]) -> Sequence[Tensor]:
        mine, flags = torch.empty(rows, cols, dtype=torch.bfloat16), ready.cpu()
        streamed_mm_eager(given[0], given[1], flags, 1, 64, 10**7, mine, torch.tensor([ALL_CAME]))
        return [mine]

    return Work(
        inputs=[a, b],
        reset=lambda: poison(out),
        run=lambda: torch.ops.treadle.streamed_mm_(*held),
        outputs=lambda: [out],
        twin=twin,
        moved_bytes=2 * (rows * inner + inner * cols + rows * cols),
    )
