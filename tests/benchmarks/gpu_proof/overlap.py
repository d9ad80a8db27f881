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

    @property
    def share(self) -> float:
        """E; 1 is perfect."""
        return self._hidden(self.together_ms)

    @property
    def controlled(self) -> bool:
        """Whether forced turns read as no overlap."""
        return self._hidden(self.in_turns_ms) <= _NOTHING

    def line(self, goal: float) -> str:
        met = "met" if self.share >= goal else "not met"
        control = "as it must" if self.controlled else "IT MUST BE ABOUT 0"
        return (
            f"overlap, {self.name}: {self.share:.3f} (goal {goal:g}, {met}); alone {self.compute_ms:.2f} and "
            f"{self.copies_ms:.2f} ms, together {self.together_ms:.2f} ms; in turns it reads "
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
