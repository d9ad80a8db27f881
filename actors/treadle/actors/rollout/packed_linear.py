"""Linear layers of the torch engine on a CPU: weights laid out once per version instead of once per product.

A decode step multiplies a few rows with every weight of the model, so that reading the weights bounds it. oneDNN
reads a copy in blocks of its own (as inductor's freezing does) up to twice as fast as the plain product at 4 to 32
rows: `tests/benchmarks/bench_linear.py`. The price is a second copy of these weights.
"""

from __future__ import annotations

import torch
from torch import nn

CACHED_ELEMENTS = 2**21
"""Linear layers with fewer weights than this together (8 MiB in float32) stay in the caches, where the plain product
is the faster one. A fixed rule and no measurement at the start: workers must not differ in their arithmetic."""
_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear:
    """The forward of one `nn.Linear`, without gradients."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        self._layer = layer
        self._rows = rows
        self.renew()

    def renew(self) -> None:
        """Takes the layer's weight anew; due whenever it has changed."""
        weight = self._layer.weight.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, self._rows)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        y = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._layer.bias, "none", [], None)
        assert isinstance(y, torch.Tensor)
        return y


def pack_linears(model: nn.Module, rows: int) -> list[PackedLinear]:
    """Replaces the forward of the model's linear layers, on a CPU and where it pays, and returns what replaces
    them. `rows` is the number the layout is chosen for; others work too."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and _can_pack(layer.weight)]
    if sum(layer.weight.numel() for layer in layers) < CACHED_ELEMENTS:
        return []
    packed = []
    for layer in layers:
        replacement = PackedLinear(layer, rows)
        layer.forward = replacement  # type: ignore[assignment, method-assign]
        packed.append(replacement)
    return packed


def _can_pack(weight: torch.Tensor) -> bool:
    return torch.backends.mkldnn.is_available() and weight.device.type == "cpu" and weight.dtype in _DTYPES
