"""A transformer's decode step on a CPU: root-mean-square norms, rotary position and attention over a slot cache, the
gate of a SwiGLU, and products of few rows.

A step has few rows, so its arithmetic is small, and dozens of small operations take longer than it. Each function here
is one call. A row's bits depend on the row alone: neither on its neighbours, nor on how far back those look, nor on the
number of threads; nor on the instruction set, but for products, which are rounded once where the processor can.

Letters: n rows, H query heads, K key-value heads, d head size, S slots, C the cache's capacity in tokens, D width.
float32 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.kernels import native
from treadle.kernels.errors import KernelError

LANES = 16
PANEL = 32
MAX_HEAD = 256
_CPU = torch.device("cpu")


def available() -> bool:
    """Whether the compiled library is there; the twins below are for comparison, not for use."""
    return native.library(_CPU) is not None


def fits(width: int) -> bool:
    """Whether rows of this width can be normed and gated."""
    return width >= LANES and width % LANES == 0


def head_fits(size: int) -> bool:
    """Whether attention heads of this size can be computed."""
    return size % (2 * LANES) == 0 and 0 < size <= MAX_HEAD


def _call(name: str, kinds: str, *arguments: int | None) -> None:
    library = native.library(_CPU)
    if library is None:
        raise KernelError(f"decode.{name} needs the compiled library; build it: python kernels/build.py")
    library.call_often(name, kinds, *arguments)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """x / √(mean x² + eps) · weight, [n, D] for x [n, D] contiguous, weight [D] and eps [1]; D a multiple of 16
    (Zhang and Sennrich, arXiv:1910.07467, eq. 4)."""
    out = torch.empty_like(x)
    rows, width = x.shape
    _call("rms_norm", "ppiipp", _at(x), _at(weight), rows, width, _at(eps), _at(out))
    return out


def rms_norm_eager(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """The twin in torch operations."""
    return F.rms_norm(x, x.shape[-1:], weight, float(eps))


def silu_gate(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, [n, D], for gate_up [n, 2·D] contiguous with the gate first; D a multiple of 16 (Shazeer,
    arXiv:2002.05202, SwiGLU)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _call("silu_gate", "piip", _at(gate_up), rows, width, _at(out))
    return out


def silu_gate_eager(gate_up: Tensor) -> Tensor:
    """The twin in torch operations."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class Panels:
    """The weights [O, D] of linear layers side by side, laid out for products with few rows: each panel of 32 outputs
    is read from memory once, in order, whatever the number of rows."""

    def __init__(self, weight: Tensor) -> None:
        self.outputs, self.inputs = weight.shape
        self._data = weight.new_zeros(-(-self.outputs // PANEL), self.inputs, PANEL)
        self.take(weight)

    @torch.inference_mode()
    def take(self, weight: Tensor) -> None:
        """Holds other weights of the same shape from now on."""
        whole = self.outputs // PANEL * PANEL
        self._data[: whole // PANEL].copy_(weight[:whole].view(-1, PANEL, self.inputs).transpose(1, 2))
        self._data[whole // PANEL :, :, : self.outputs - whole] = weight[whole:].t()

    def product(self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """x · Wᵀ + bias + residual, [n, O], for x [n, D], bias [O] and residual [n, O], all contiguous."""
        out = x.new_empty(x.shape[0], self.outputs)
        tensors = map(_at, (x, self._data, bias, residual, out))
        _call("panel_product", "pppppiii", *tensors, x.shape[0], self.inputs, self.outputs)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The attention of one layer. `cos` and `sin` [C, d] turn a head at position p by x·cos[p] + rotate_half(x)·sin[p]
    (Su et al., arXiv:2104.09864, as transformers lays it out). `scale_eps` [2] holds the factor of the scores and the
    eps of `q_norm` and `k_norm` [d], norms of single heads before they are turned."""

    heads: int
    kv_heads: int
    size: int
    cos: Tensor
    sin: Tensor
    scale_eps: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


def decode_attention(qkv: Tensor, positions: Tensor, keys: Tensor, values: Tensor, layer: Heads) -> Tensor:
    """One position per row, [n, H·d]: row r's key and value enter `keys` and `values` [S, K, C, d] at slot r and
    `positions[r]` ([n] int64), and its queries attend to all of slot r up to there.

    qkv [n, (H + 2·K)·d]: queries, keys, values. All contiguous. Raises `KernelError` for a position outside the cache
    or heads that do not fit.
    """
    out = qkv.new_empty(qkv.shape[0], layer.heads * layer.size)
    tables = (layer.cos, layer.sin, layer.q_norm, layer.k_norm, layer.scale_eps)
    tensors = map(_at, (qkv, positions, *tables, keys, values, out))
    sizes = (qkv.shape[0], layer.heads, layer.kv_heads, layer.size, keys.shape[2])
    _call("decode_attention", "pppppppppp" + "iiiii", *tensors, *sizes)
    return out


def decode_attention_eager(
    qkv: Tensor, positions: Tensor, keys: Tensor, values: Tensor, layer: Heads
) -> Tensor:
    """The twin in torch operations, a row at a time."""
    scale, eps = layer.scale_eps
    rows = qkv.view(len(qkv), -1, layer.size)
    mixed = []
    for row, position in enumerate(positions.tolist()):
        q, k, v = rows[row].split((layer.heads, layer.kv_heads, layer.kv_heads))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm_eager(q, layer.q_norm, eps), rms_norm_eager(k, layer.k_norm, eps)
        q, k = (_turned(x, layer.cos[position], layer.sin[position]) for x in (q, k))
        keys[row, :, position], values[row, :, position] = k, v
        past = (
            x[row, :, : position + 1].repeat_interleave(layer.heads // layer.kv_heads, 0)
            for x in (keys, values)
        )
        of_keys, of_values = past
        weights = torch.softmax((of_keys @ (q * scale)[:, :, None])[..., 0], dim=-1)
        mixed.append((weights[:, None] @ of_values).reshape(-1))
    return torch.stack(mixed)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
