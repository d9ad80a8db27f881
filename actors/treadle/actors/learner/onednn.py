"""Linear layers of a rank on a CPU, multiplied by oneDNN.

torch multiplies fp32 matrices with MKL. On an AMD EPYC, forward and backward together took 5 to 8 % less with oneDNN
(`tests/benchmarks/bench_linear.py`); other processors were not measured. Outputs and gradients of inputs are computed
here; gradients of weights have another shape, and stay with torch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def use_onednn(model: nn.Module) -> None:
    """Replaces the forward of the fp32 `nn.Linear` modules, where torch has oneDNN. Their parameters stay theirs: what
    partitions or gathers them (ZeRO) goes on as before."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    """[..., in_features] to [..., out_features]."""
    y = _Linear.apply(x, module.weight, module.bias)
    assert isinstance(y, Tensor)
    return y


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
    assert isinstance(y, Tensor)
    return y


class _Linear(torch.autograd.Function):
    """Saves the weight itself, so that one which is gathered again before the backward pass is seen there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        (grad,) = grads
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            _product(grad, weight.t().contiguous(), None) if need_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )
