"""A decode step of the Llama family (Llama, Mistral, Qwen2, Qwen3 …), written out for a CPU.

A step of few rows has little arithmetic: half of its time went into module calls and small operations. Here q, k and
v are one product, gate and up another, residuals are added by the product before them, and all of it is
`treadle.kernels.decode`. The price is a second copy of the weights. transformers' modules stay for prefill and scoring,
and for every model that is not built so. Which one is, its logits say when it is loaded, not its name.

Letters: n rows, H query heads, K key-value heads, d head size, D width, V vocabulary, C context tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from treadle.actors.rollout.kv_cache import SlotCache
from treadle.kernels import decode

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Norm:
    weight: torch.Tensor
    eps: torch.Tensor

    @classmethod
    def of(cls, module: Any) -> _Norm:
        return cls(weight=module.weight.detach(), eps=torch.tensor([float(module.variance_epsilon)]))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return decode.rms_norm(x, self.weight, self.eps)


class _Product:
    """Linear layers with the same input as one product."""

    def __init__(self, *layers: nn.Linear) -> None:
        self._layers = layers
        self._panels = decode.Panels(self._weight())
        self._bias = self._joined_bias()

    def renew(self) -> None:
        """Takes the layers' weights anew."""
        self._panels.take(self._weight())
        self._bias = self._joined_bias()

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[n, the layers' outputs side by side] for x [n, D], with `residual` of that shape added."""
        return self._panels.product(x, self._bias, residual)

    def _weight(self) -> torch.Tensor:
        return torch.cat([layer.weight.detach() for layer in self._layers])

    def _joined_bias(self) -> torch.Tensor | None:
        if all(layer.bias is None for layer in self._layers):
            return None
        none = [layer.weight.new_zeros(layer.out_features) for layer in self._layers]
        biases = [layer.bias for layer in self._layers]
        return torch.cat([a if b is None else b.detach() for a, b in zip(none, biases, strict=True)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    before_attention: _Norm
    qkv: _Product
    heads: decode.Heads
    attention_out: _Product
    before_mlp: _Norm
    gate_up: _Product
    down: _Product


class LlamaDecode:
    """Reads the model's parameters in place, but for those of products: `renew` follows new weights."""

    def __init__(self, model: Any, context_tokens: int) -> None:
        base = model.base_model
        self._embedding = base.embed_tokens.weight.detach()
        cos, sin = base.rotary_emb(self._embedding[:1], torch.arange(context_tokens)[None])
        self._layers = [_layer(layer, cos[0].contiguous(), sin[0].contiguous()) for layer in base.layers]
        self._norm = _Norm.of(base.norm)
        self._head = _Product(model.get_output_embeddings())

    def renew(self) -> None:
        """Takes changed weights; due after every adoption."""
        for layer in self._layers:
            for product in (layer.qkv, layer.attention_out, layer.gate_up, layer.down):
                product.renew()
        self._head.renew()

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, cache: SlotCache) -> torch.Tensor:
        """Logits [n, V] of `tokens` [n] at `positions` [n], whose K and V enter the cache, which has the room."""
        x = self._embedding[tokens]
        for index, layer in enumerate(self._layers):
            heads = layer.heads
            keys, values = cache.of_layer(index, heads.kv_heads, heads.size, x)
            qkv = layer.qkv(layer.before_attention(x))
            mixed = decode.decode_attention(qkv, positions, keys, values, heads)
            x = layer.attention_out(mixed, x)
            x = layer.down(decode.silu_gate(layer.gate_up(layer.before_mlp(x))), x)
        return self._head(self._norm(x))


def _layer(layer: Any, cos: torch.Tensor, sin: torch.Tensor) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    size = int(attention.head_dim)
    norms = [_Norm.of(getattr(attention, name)) for name in sorted(_HEAD_NORMS & _names(attention))]
    heads = decode.Heads(
        heads=attention.q_proj.out_features // size,
        kv_heads=attention.k_proj.out_features // size,
        size=size,
        cos=cos,
        sin=sin,
        scale_eps=torch.tensor([float(attention.scaling), float(norms[0].eps) if norms else 0.0]),
        k_norm=norms[0].weight if norms else None,
        q_norm=norms[1].weight if norms else None,
    )
    return _Layer(
        before_attention=_Norm.of(layer.input_layernorm),
        qkv=_Product(attention.q_proj, attention.k_proj, attention.v_proj),
        heads=heads,
        attention_out=_Product(attention.o_proj),
        before_mlp=_Norm.of(layer.post_attention_layernorm),
        gate_up=_Product(mlp.gate_proj, mlp.up_proj),
        down=_Product(mlp.down_proj),
    )


def looks_like_llama(model: Any) -> bool:
    """Whether the model is made of the parts that `LlamaDecode` knows, in sizes that its kernels take, and computes
    in float32 on a CPU. That they are put together in the same way is for its logits to say."""
    base = model.base_model
    if not all(hasattr(base, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
        return False
    head = model.get_output_embeddings()
    return (
        decode.available()
        and type(head) is nn.Linear
        and head.weight.device.type == "cpu"
        and head.weight.dtype == torch.float32
        and decode.fits(head.in_features)
        and hasattr(base.norm, "variance_epsilon")
        and all(_has_known_parts(layer) for layer in base.layers)
    )


def _has_known_parts(layer: Any) -> bool:
    if _names(layer) != _LAYER:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    if _names(attention) not in (_ATTENTION, _ATTENTION | _HEAD_NORMS) or _names(mlp) != _MLP:
        return False
    products = [getattr(attention, name) for name in _ATTENTION]
    products += [getattr(mlp, name) for name in _MLP - {"act_fn"}]
    norms = [getattr(layer, name) for name in _LAYER - {"self_attn", "mlp"}]
    norms += [getattr(attention, name) for name in _HEAD_NORMS & _names(attention)]
    return (
        all(type(one) is nn.Linear for one in products)
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and all(hasattr(attention, name) for name in ("scaling", "head_dim"))
        and decode.head_fits(attention.head_dim)
        and decode.fits(mlp.down_proj.in_features)
        and _is_silu(mlp.act_fn)
    )


def _is_silu(activation: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    x = torch.linspace(-8, 8, 33)
    return torch.allclose(activation(x), F.silu(x))


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
