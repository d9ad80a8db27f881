"""How much of two things that run at the same time is hidden: E = (t_c + t_m − t_o) / min(t_c, t_m), 1 for all of the
shorter one and 0 for nothing. t_c is the computation alone, t_m the copies alone, t_o both together.

The link is pinned host memory: real transfers by real copy engines. The control forces both into turns, and must read
about 0: a measurement that finds overlap there finds it anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tests.benchmarks.gpu_proof.proof import median_ms
from tests.benchmarks.gpu_proof.works import drawn

from treadle.kernels.pack import Packing
from treadle.kernels.streamed_mm import ALL_CAME

SLICES = 16
ROUNDS = 20
_NOTHING = 0.1  # what the control may read


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Milliseconds of both sides alone, together, and in forced turns."""

    name: str
    compute_ms: float
    copies_ms: float
    together_ms: float
    in_turns_ms: float
    rival_ms: float = 0.0
    """Copies and then torch's own product; 0 where there is no such thing."""
    right: bool = True
    """Whether results were those of turns, and a consumer without flags was found to read too early."""

    @property
    def share(self) -> float:
        """E; 1 is perfect."""
        return self._hidden(self.together_ms)

    @property
    def controlled(self) -> bool:
        """Whether forced turns read as no overlap, and results are right where they must be, and only there."""
        return self.right and self._hidden(self.in_turns_ms) <= _NOTHING

    def line(self, goal: float) -> str:
        met = "met" if self.share >= goal else "not met"
        control = (
            "as it must"
            if self.controlled
            else "IT MUST BE ABOUT 0"
            if self.right
            else "BUT RESULTS ARE WRONG"
        )
        rival = f", copies and then torch's product {self.rival_ms:.2f} ms" if self.rival_ms else ""
        return (
            f"overlap, {self.name}: {self.share:.3f} (goal {goal:g}, {met}); alone {self.compute_ms:.2f} and "
            f"{self.copies_ms:.2f} ms, together {self.together_ms:.2f} ms{rival}; in turns it reads "
            f"{self._hidden(self.in_turns_ms):.3f}, {control}"
        )

    def _hidden(self, both_ms: float) -> float:
        shorter = min(self.compute_ms, self.copies_ms)
        return (self.compute_ms + self.copies_ms - both_ms) / shorter


def overlap_of_pack(device: torch.device, size_bytes: int) -> Overlap:
    """Packing into a ring of two buckets, and the copy of each to the host. Packing is repeated until it takes about as
    long as the copy, so that the shorter side is no trifle."""
    tensors = [t.to(device) for t in drawn(size_bytes // 2, 5, torch.bfloat16).chunk(SLICES)]
    packings = [Packing([t]) for t in tensors]
    buckets = [packings[0].buffers(device) for _ in range(2)]
    host = torch.empty(packings[0].bucket_bytes, dtype=torch.uint8, pin_memory=True)

    def pack(i: int, times: int) -> None:
        for _ in range(times):
            packings[i].pack_([tensors[i]], *buckets[i % 2], epoch=1)

    def copy(i: int) -> None:
        size = packings[i].bucket_bytes
        host[:size].copy_(buckets[i % 2][0][:size], non_blocking=True)

    alone_ms = median_ms(lambda: [pack(i, 1) for i in range(SLICES)], device, rounds=ROUNDS)
    copies_ms = median_ms(lambda: [copy(i) for i in range(SLICES)], device, rounds=ROUNDS)
    times = max(1, round(copies_ms / alone_ms))
    return Overlap(
        name="pack and copies to the host",
        compute_ms=median_ms(lambda: [pack(i, times) for i in range(SLICES)], device, rounds=ROUNDS),
        copies_ms=copies_ms,
        together_ms=median_ms(lambda: _pipelined(pack, copy, times, turns=False), device, rounds=ROUNDS),
        in_turns_ms=median_ms(lambda: _pipelined(pack, copy, times, turns=True), device, rounds=ROUNDS),
    )


def _pipelined(
    pack: Callable[[int, int], None], copy: Callable[[int], None], times: int, *, turns: bool
) -> None:
    """Copies on a stream of their own. A bucket is packed again when its copy is over; with `turns`, when the copy
    before it is."""
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    copied: list[torch.cuda.Event] = []
    for i in range(SLICES):
        behind = i - 1 if turns else i - 2
        if behind >= 0:
            main.wait_event(copied[behind])
        pack(i, times)
        packed = torch.cuda.Event()
        packed.record(main)
        side.wait_event(packed)
        with torch.cuda.stream(side):
            copy(i)
            copied.append(torch.cuda.Event())
            copied[-1].record(side)
    main.wait_event(copied[-1])


class _Stream:
    """Rows of `a` from pinned memory in `CHUNKS` chunks, and the product that waits for them."""

    CHUNKS = 32

    def __init__(self, device: torch.device, side: int) -> None:
        inner = side // 2
        self.host = torch.randint(-8, 9, (side, inner)).bfloat16().pin_memory()
        self.a = torch.empty(side, inner, dtype=torch.bfloat16, device=device)
        self.b = torch.randint(-8, 9, (inner, side), device=device).bfloat16()
        self.out = torch.empty(side, side, dtype=torch.bfloat16, device=device)
        self.ready = torch.zeros(self.CHUNKS, dtype=torch.int32, device=device)
        self.verdict = torch.tensor([ALL_CAME]).to(device)
        self.rows = side // self.CHUNKS
        self.epoch = torch.zeros(1, dtype=torch.int32).pin_memory()
        self.side = torch.cuda.Stream()

    def advance(self) -> None:
        """To the next epoch, when nobody reads the pinned one any more."""
        torch.cuda.synchronize()
        self.epoch += 1

    def copy(self) -> None:
        """On the current stream; flags come from pinned memory too, so that no kernel is needed to write them."""
        for c in range(self.CHUNKS):
            rows = slice(c * self.rows, (c + 1) * self.rows)
            self.a[rows].copy_(self.host[rows], non_blocking=True)
            self.ready[c : c + 1].copy_(self.epoch, non_blocking=True)

    def multiply(self) -> None:
        given = (self.a, self.b, self.ready, int(self.epoch), self.rows, 10**7, self.out, self.verdict)
        torch.ops.treadle.streamed_mm_(*given)

    def together(self, *, turns: bool = False) -> None:
        """The product is enqueued before the copies that it waits for, unless in turns. After `advance`."""
        start = torch.cuda.Event()
        start.record()
        self.side.wait_event(start)
        if not turns:
            self.multiply()
        with torch.cuda.stream(self.side):
            self.copy()
        if turns:
            torch.cuda.current_stream().wait_stream(self.side)
            self.multiply()

    def poisoned(self, *, flags: bool) -> torch.Tensor:
        """The product while rows arrive over NaNs; without flags every row counts as there from the start."""
        self.advance()
        self.a.fill_(torch.nan)
        if not flags:
            self.ready.fill_(int(self.epoch))
        self.together()
        torch.cuda.synchronize()
        return self.out.clone()


def overlap_of_product(device: torch.device, side: int) -> Overlap:
    """Rows over the link from pinned memory, and a product of [side, side / 2] and [side / 2, side] meanwhile."""
    stream = _Stream(device, side)
    stream.advance()
    stream.together(turns=True)
    torch.cuda.synchronize()
    wanted = stream.out.clone()
    right = torch.equal(stream.poisoned(flags=True), wanted)
    caught = bool(stream.poisoned(flags=False).isnan().any())

    def rival() -> None:
        stream.copy()
        torch.mm(stream.a, stream.b, out=stream.out)

    return Overlap(
        name="product and copies from the host",
        compute_ms=median_ms(stream.multiply, device, rounds=ROUNDS),
        copies_ms=median_ms(stream.copy, device, rounds=ROUNDS),
        together_ms=median_ms(stream.together, device, rounds=ROUNDS, before=stream.advance),
        in_turns_ms=median_ms(
            lambda: stream.together(turns=True), device, rounds=ROUNDS, before=stream.advance
        ),
        rival_ms=median_ms(rival, device, rounds=ROUNDS),
        right=right and caught,
    )
