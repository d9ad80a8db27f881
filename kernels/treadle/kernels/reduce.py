"""The sum of several tensors, in fixed order, rounded once: the CPU half of a hierarchical all-reduce.

Where GPUs are joined by PCIe alone, gradients are summed in host memory on their way to the network (HFReduce,
arXiv:2408.14158). Adding k tensors in pairs would round k − 1 times and read every partial sum again; here each
element is summed in an fp32 accumulator, in the order of the inputs, whatever the number of threads.

k inputs of n elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treadle.kernels import native
from treadle.kernels.native import addresses
from treadle.kernels.registry import op, writes_only

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def hierarchical_reduce(inputs: Sequence[Tensor], *, out: Tensor | None = None) -> Tensor:
    """Σ inputs, elementwise, on the current stream.

    inputs: k ≥ 1 contiguous tensors of one shape, device and dtype: float32, bfloat16 or float16. `out`, the same or
    one of them, is written and returned; without it a new tensor is. A NaN has no sign and no payload. Raises
    `ValueError` for anything else.
    """
    if not inputs or inputs[0].dtype not in KINDS:
        raise ValueError(f"reduce: {len(inputs)} inputs; need at least one, of {', '.join(map(str, KINDS))}")
    out = torch.empty_like(inputs[0]) if out is None else out
    first = inputs[0]
    for tensor in (*inputs, out):
        if (tensor.shape, tensor.dtype, tensor.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"reduce: {tensor.dtype} {tuple(tensor.shape)} on {tensor.device} beside {first.dtype} "
                f"{tuple(first.shape)} on {first.device}; all must be alike"
            )
        if not tensor.is_contiguous():
            raise ValueError("reduce: a tensor is not contiguous; pass tensor.contiguous()")
    torch.ops.treadle.reduce_([tensor.detach() for tensor in inputs], out.detach())
    return out


@op("reduce_(Tensor[] inputs, Tensor(a!) out) -> ()", fake=writes_only)
def _reduce(inputs: Sequence[Tensor], out: Tensor) -> None:
    library = native.library(out.device)
    if not library:
        out.copy_(reduce_eager(inputs))
        return
    at = addresses(out.device, inputs)
    library.call("reduce", at, len(inputs), out.numel(), KINDS[out.dtype], out, device=out.device)


def reduce_eager(inputs: Sequence[Tensor]) -> Tensor:
    """The twin in torch operations."""
    total = inputs[0].float()
    for tensor in inputs[1:]:
        total = total + tensor.float()
    return with_one_nan(total, inputs[0].dtype)


def with_one_nan(total: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 sums in `dtype`, all NaNs with the same bits: torch's conversion leaves them to the processor."""
    return torch.where(
        total.isnan(), torch.tensor(torch.nan, dtype=dtype, device=total.device), total.to(dtype)
    )
