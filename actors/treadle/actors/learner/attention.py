"""Attention over packed sequences for any Hugging Face model that uses the attention interface.

Registered as `treadle_packed`: the model computes everything else on the packed row [1, N, …]; attention
alone sees sequences. On CUDA that is the variable-length flash kernel, elsewhere rectangles of similar
lengths and scaled-dot-product attention with `is_causal`, which needs no mask: what follows a sequence's end
in its rectangle is never attended to by the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.actors.learner.imports import import_transformers
from treadle.actors.learner.layout import PackedLayout
from treadle.platform.errors import ConfigError

PACKED = "treadle_packed"
LAYOUT = "packed_layout"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Output [1, N, H, d] for query [1, H, N, d] and key, value [1, K, N, d] (K key heads, H a multiple)."""
    layout = kwargs.get(LAYOUT)
    _check(module, layout, attention_mask, kwargs)
    assert isinstance(layout, PackedLayout)
    window = None if sliding_window is None or sliding_window >= layout.max_length else sliding_window
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [N, H or K, d]
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        out = _varlen(q, k, v, layout, scaling, window)
    else:
        out = _rectangles(q, k, v, layout, scaling, window)
    return out.unsqueeze(0), None


def _check(module: nn.Module, layout: object, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    present = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if mask is not None:
        present.append("a mask of its own")
    if layout is None:
        present.append("no way through for attention arguments")
    if present:
        raise ConfigError(
            f"{type(module).__name__} has {', '.join(present)}, which packed attention does not know.",
            "Set learner.packing=padded.",
        )


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if layout.shares:
        q, k, v = (x.index_select(0, layout.in_sequence) for x in (q, k, v))
    out = varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        layout.cu_seqlens,
        layout.cu_seqlens,
        layout.max_length,
        layout.max_length,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.index_select(0, layout.from_sequence) if layout.shares else out


def _rectangles(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scaling: float | None, window: int | None
) -> Tensor:
    """[N, H, d]; one attention call per bucket of similar lengths."""
    outputs = []
    for index in layout.buckets:
        rows, width = index.shape
        flat = index.view(-1)
        q_b, k_b, v_b = (
            x.index_select(0, flat).view(rows, width, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(
            q_b,
            k_b,
            v_b,
            attn_mask=None if window is None else _window_mask(width, window, q.device),
            is_causal=window is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out.transpose(1, 2).reshape(rows * width, *q.shape[1:]))
    places = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return places.index_select(0, layout.bucket_places)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """[L, L] bool: each position sees itself and the window-1 before it."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - window)


def register() -> None:
    """Makes `attn_implementation="treadle_packed"` known to transformers. A name without a mask function
    means that the model builds no mask."""
    import_transformers().AttentionInterface.register(PACKED, packed_attention)
