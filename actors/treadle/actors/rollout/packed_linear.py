"""Linear layers of the torch engine on a CPU: weights laid out once per version instead of once per product.

A decode step multiplies a few rows with every weight of the model, so that reading the weights bounds it. oneDNN
reads a copy in blocks of its own (as inductor's freezing does) up to twice as fast as the plain product at 4 to 32
rows: `tests/benchmarks/bench_linear.py`. The price is a second copy of these weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

CACHED_ELEMENTS = 2**21
"""Linear layers with fewer weights than this together (8 MiB in float32) stay in the caches, where the plain product
is the faster one. A fixed rule and no measurement at the start: workers must not differ in their arithmetic."""
_DTYPES = (torch.float32, torch.bfloat16)


class JoinedLinear:
    """The forward of one `nn.Linear`, or of several with the same input side by side, without gradients."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = layers
        self.renew()

    def renew(self) -> None:
        """Takes the layers' weights anew; due whenever they have changed."""
        weights = [layer.weight.detach() for layer in self._layers]
        self._weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self._bias = self._joined_bias()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., the layers' out_features together]."""
        return F.linear(x, self._weight, self._bias)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The product, added to `residual` of its shape."""
        return F.linear(x, self._weight, self._bias).add_(residual)

    def _joined_bias(self) -> torch.Tensor | None:
        biases = [layer.bias for layer in self._layers]
        if all(bias is None for bias in biases):
            return None
        return torch.cat(
            [
                layer.weight.new_zeros(layer.out_features) if bias is None else bias.detach()
                for layer, bias in zip(self._layers, biases, strict=True)
            ]
        )


class PackedLinear(JoinedLinear):
    """The same with oneDNN's packed weights. `rows` is the number the layout is chosen for; others work too."""

    def __init__(self, layers: Sequence[nn.Linear], rows: int) -> None:
        self._rows = rows
        super().__init__(layers)

    def renew(self) -> None:
        super().renew()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, self._rows)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], None)
        assert isinstance(y, torch.Tensor)
        return y

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        assert isinstance(y, torch.Tensor)
        return y


def pack_linears(model: nn.Module, rows: int) -> list[PackedLinear]:
    """Replaces the forward of the model's linear layers, on a CPU and where it pays, and returns what replaces
    them."""
    if not packing_pays(model):
        return []
    packed = []
    for layer in _packable(model):
        replacement = PackedLinear([layer], rows)
        layer.forward = replacement  # type: ignore[assignment, method-assign]
        packed.append(replacement)
    return packed


def packing_pays(model: nn.Module) -> bool:
    """Whether the model's linear layers are to be packed."""
    return sum(layer.weight.numel() for layer in _packable(model)) >= CACHED_ELEMENTS


def _packable(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if type(layer) is nn.Linear and _can_pack(layer.weight)]


def _can_pack(weight: torch.Tensor) -> bool:
    return torch.backends.mkldnn.is_available() and weight.device.type == "cpu" and weight.dtype in _DTYPES
