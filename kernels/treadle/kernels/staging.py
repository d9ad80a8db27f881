"""A ring of buckets between the packer that fills them and the transport that drains them.

    packer      acquire → pack_ (slot.bucket, slot.scales, slot.flags, epoch=slot.epoch)
    transport   wait_chunk for chunk 0, 1, … → send each → drained

Consumes: nothing. Waits for: the drained slot that comes next, and for chunk flags. Unblocked by: `drained`, and by
the kernel that packs. Produces: slots in the order of their epochs. Every wait has a deadline.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.kernels.pack import Packing

_POLL_S = 50e-6


@dataclass(frozen=True, slots=True)
class Slot:
    """One bucket of the ring, for one epoch."""

    index: int
    epoch: int
    bucket: Tensor
    scales: Tensor
    flags: Tensor


class StagingRing:
    """`count` sets of buffers for one packing, used in turns; two let packing and sending overlap.

    Raises `ValueError` for a count below 1."""

    def __init__(self, packing: Packing, *, count: int = 2, device: torch.device) -> None:
        if count < 1:
            raise ValueError(f"staging: count={count} must be at least 1")
        self._buffers = [packing.buffers(device) for _ in range(count)]
        self._free = [True] * count
        self._events: list[torch.cuda.Event | None] = [None] * count
        self._epoch = 0
        self._changed = threading.Condition()

    def acquire(self, *, timeout_s: float) -> Slot:
        """The next slot, as soon as it is drained; on CUDA the current stream waits for the transport's copies too.
        Raises `TimeoutError` when the transport does not keep up."""
        with self._changed:
            index = self._epoch % len(self._buffers)
            if not self._changed.wait_for(lambda: self._free[index], timeout_s):
                raise TimeoutError(
                    f"staging: slot {index} is not drained after {timeout_s} s; the transport hangs or is slower than "
                    "the packer: look at it, or allow more time"
                )
            self._free[index] = False
            self._epoch += 1
            if event := self._events[index]:
                torch.cuda.current_stream().wait_event(event)
            return Slot(index, self._epoch, *self._buffers[index])

    def wait_chunk(self, slot: Slot, chunk: int, *, timeout_s: float) -> None:
        """Returns when the chunk is packed. Raises `TimeoutError`."""
        deadline = time.monotonic() + timeout_s
        while int(slot.flags[chunk]) != slot.epoch:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"staging: chunk {chunk} of epoch {slot.epoch} is not packed after {timeout_s} s; see whether the "
                    "packer failed"
                )
            time.sleep(_POLL_S)

    def drained(self, slot: Slot, *, event: torch.cuda.Event | None = None) -> None:
        """Gives the slot back. `event` is recorded behind the transport's last copy out of it; without one the
        copies are over. Raises `ValueError` for a slot that is not out."""
        with self._changed:
            if self._free[slot.index] or slot.epoch <= self._epoch - len(self._buffers):
                raise ValueError(f"staging: slot {slot.index} of epoch {slot.epoch} was given back already")
            self._events[slot.index] = event
            self._free[slot.index] = True
            self._changed.notify_all()
