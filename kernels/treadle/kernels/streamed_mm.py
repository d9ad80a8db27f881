"""A matrix product that starts on rows while others are still arriving.

    copy, then multiply      ────copy────┬──multiply──
    streamed_mm              ────copy────┬─           chunk c is multiplied once ready[c] says that it is there
                               ─multiply─

The rows of `a` come in chunks, in any order, over whatever link; whoever brings them writes the epoch to the chunk's
flag after its last byte. With CUDA that is a copy engine's stream: the rows' copy, then four bytes from pinned memory
into the flag. A kernel could not do it: waiting thread blocks may hold all multiprocessors. The idea is that of Flux
(arXiv:2406.06858) and of torch's `_async_input_mm`.

Consumes: `a`, chunk by chunk. Waits for: the flags, no longer than the deadline. Unblocked by: the writer of the flags.
Produces: `out`. M rows, N columns, K summands per element, C = ⌈M / chunk_rows⌉ chunks.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from treadle.kernels import native
from treadle.kernels.reduce import KINDS, with_one_nan
from treadle.kernels.registry import op, writes_only

ALL_CAME = 2**63 - 1
_POLL_S = 20e-6


def streamed_mm(
    a: Tensor,
    b: Tensor,
    ready: Tensor,
    *,
    epoch: int,
    chunk_rows: int,
    deadline_s: float,
    out: Tensor | None = None,
) -> Tensor:
    """[M, N]: a · b with fp32 accumulators, rounded once.

    a [M, K], b [K, N] and `out` [M, N] are contiguous, on one device, and all float32, bfloat16 or float16; ready [C]
    int32: chunk c of `a` may be read once ready[c] has reached `epoch`, which counts round 2³² upwards from one use of
    the flags to the next. Waits for the current stream. Raises `ValueError` for other tensors, and `TimeoutError` when
    a chunk has not arrived `deadline_s` seconds after the call; `out` then holds some rows."""
    out = a.new_empty(a.shape[0], b.shape[-1]) if out is None else out
    _check(a, b, ready, out, chunk_rows, deadline_s)
    verdict = torch.tensor([ALL_CAME]).to(a.device)
    arguments = (
        a.detach(),
        b.detach(),
        ready,
        epoch,
        chunk_rows,
        int(1e6 * deadline_s),
        out.detach(),
        verdict,
    )
    torch.ops.treadle.streamed_mm_(*arguments)
    late = int(verdict)
    if late != ALL_CAME:
        raise TimeoutError(
            f"streamed_mm: chunk {late} of {ready.numel()} has not arrived after deadline_s={deadline_s:g}; see "
            "whether its sender failed, or allow more time"
        )
    return out


def _check(a: Tensor, b: Tensor, ready: Tensor, out: Tensor, chunk_rows: int, deadline_s: float) -> None:
    if a.ndim != 2 or b.ndim != 2 or out.shape != (a.shape[0], b.shape[1]) or a.shape[1] != b.shape[0]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (a, b, out))
        raise ValueError(f"streamed_mm: a, b and out are {shapes}; need [M, K], [K, N] and [M, N]")
    for tensor in (a, b, out):
        if tensor.dtype not in KINDS or tensor.dtype != a.dtype or tensor.device != a.device:
            raise ValueError(
                f"streamed_mm: {tensor.dtype} on {tensor.device} beside {a.dtype} on {a.device}; need one device and "
                f"one of {', '.join(map(str, KINDS))}"
            )
        if not tensor.is_contiguous():
            raise ValueError("streamed_mm: a tensor is not contiguous; pass tensor.contiguous()")
    if chunk_rows < 1 or deadline_s <= 0:
        raise ValueError(f"streamed_mm: chunk_rows={chunk_rows} and deadline_s={deadline_s} must be positive")
    chunks = -(-a.shape[0] // chunk_rows)
    if ready.dtype != torch.int32 or ready.shape != (chunks,) or ready.device != a.device:
        raise ValueError(f"streamed_mm: ready must be int32 [{chunks}] on {a.device}")


@op(
    "streamed_mm_(Tensor a, Tensor b, Tensor ready, int epoch, int chunk_rows, int deadline_us, Tensor(a!) out, "
    "Tensor(b!) verdict) -> ()",
    fake=writes_only,
)
def _streamed_mm(
    a: Tensor,
    b: Tensor,
    ready: Tensor,
    epoch: int,
    chunk_rows: int,
    deadline_us: int,
    out: Tensor,
    verdict: Tensor,
) -> None:
    """Enqueued on the current stream; `verdict` [1] int64 becomes the first late chunk. The CUDA library takes 16-bit
    numbers, N and K that are multiples of 8, and 16-byte alignment; for others the twin waits on the host."""
    library = native.library(a.device)
    if not library or (a.device.type == "cuda" and not _for_tensor_cores(a, b)):
        streamed_mm_eager(a, b, ready, epoch, chunk_rows, deadline_us, out, verdict)
        return
    sizes = (a.shape[0], b.shape[1], a.shape[1])
    library.call(
        "streamed_mm",
        *(a, b, out, *sizes, KINDS[a.dtype], ready, chunk_rows, epoch, deadline_us, verdict),
        device=a.device,
    )


def _for_tensor_cores(a: Tensor, b: Tensor) -> bool:
    sides = a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
    return a.element_size() == 2 and sides and (a.data_ptr() | b.data_ptr()) % 16 == 0


def streamed_mm_eager(
    a: Tensor,
    b: Tensor,
    ready: Tensor,
    epoch: int,
    chunk_rows: int,
    deadline_us: int,
    out: Tensor,
    verdict: Tensor,
) -> None:
    """The twin: torch's product of each chunk, as it arrives. Sums are fp32 in torch's order, not that of K."""
    wide, pending = b.float(), list(range(ready.numel()))
    deadline = time.monotonic() + 1e-6 * deadline_us
    while pending:
        flags = ready.tolist()
        came = [c for c in pending if (flags[c] - epoch) % (1 << 32) < 1 << 31]
        for c in came:
            rows = slice(c * chunk_rows, (c + 1) * chunk_rows)
            out[rows] = with_one_nan(a[rows].float() @ wide, out.dtype)
        pending = [c for c in pending if c not in came]
        if pending and not came:
            if time.monotonic() > deadline:
                verdict.fill_(pending[0])
                return
            time.sleep(_POLL_S)
