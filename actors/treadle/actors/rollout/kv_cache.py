"""The KV cache of all slots, written in place, and the attention that reads it.

Letters: S slots, n rows of one forward (the first n slots), H query heads, K key-value heads, D head size,
C capacity in tokens, c the cache's step, L = j·c tokens that attention looks back over.

What keeps a row's arithmetic its own, bit for bit, although L follows the longest row of the batch: all
matrix products run over one step of c tokens at a time, so that their shape never changes, and are added up
in order; positions beyond the row's own get a weight of exactly zero, and adding zeros changes no sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from treadle.platform.errors import ConfigError

ATTENTION = "treadle_slots"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


class SlotCache(Cache):
    """K and V per layer, [S, K, C, D], allocated at the first write. One decode forward writes one position
    per row; `aim` says which."""

    def __init__(self, slots: int, step_tokens: int) -> None:
        super().__init__(layers=[])
        self._slots = slots
        self.step_tokens = step_tokens
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._capacity = step_tokens
        self._span = step_tokens
        self._rows = 0
        self._positions = torch.zeros(0, dtype=torch.int64)
        self._flat: dict[tuple[int, int], torch.Tensor] = {}

    def aim(self, positions: torch.Tensor, longest: int) -> int:
        """The next forward writes row r at `positions[r]` ([n] int64); `longest` is the largest of them that
        matters, plus 1. Returns L."""
        self._span = -(-longest // self.step_tokens) * self.step_tokens
        self.reserve(self._span)
        self._rows = len(positions)
        self._positions = positions
        self._flat = {}
        return self._span

    def reserve(self, tokens: int) -> None:
        """Grows C in steps until `tokens` fit; what is held stays."""
        if tokens <= self._capacity:
            return
        self._capacity = -(-tokens // self.step_tokens) * self.step_tokens
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                tensors[layer] = self._grown(old)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model's attention with [n, K, 1, D]; returns views [n, K, L, D]."""
        self._ensure(layer_idx, key_states, value_states)
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        for cache, states in ((keys, key_states), (values, value_states)):
            index = self._index(states.shape[1], cache.device)
            cache.view(-1, cache.shape[-1]).index_copy_(0, index, states.reshape(-1, states.shape[-1]))
        return keys[: self._rows, :, : self._span], values[: self._rows, :, : self._span]

    def of_layer(
        self, layer: int, heads: int, size: int, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all slots, [S, K, C, D], for whoever writes and reads them itself; C is at least what was aimed
        at."""
        if layer >= len(self._keys):
            empty = like.new_empty(1, heads, 1, size)
            self._ensure(layer, empty, empty)
        return self._keys[layer], self._values[layer]

    def put(self, slots: list[int], states: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copies one sequence's K and V ([K, T, D] per layer) to the head of each of `slots`."""
        if not states or not slots:
            return
        tokens = states[0][0].shape[1]
        self.reserve(tokens)
        index = torch.tensor(slots, device=states[0][0].device)
        for layer, (keys, values) in enumerate(states):
            self._ensure(layer, keys[None], values[None])
            self._keys[layer][index, :, :tokens] = keys
            self._values[layer][index, :, :tokens] = values

    def move(self, sources: list[int], targets: list[int], tokens: int) -> None:
        """Copies the first `tokens` positions of whole slots, pairwise."""
        for cache in (*self._keys, *self._values):
            cache[targets, :, :tokens] = cache[sources, :, :tokens]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Zero: every forward says its positions itself."""
        return 0

    def _index(self, heads: int, device: torch.device) -> torch.Tensor:
        """Flat [n·K] positions in [S·K·C]; the same for all layers with as many heads."""
        key = (heads, self._capacity)
        if key not in self._flat:
            rows = torch.arange(self._rows, device=device)[:, None] * heads
            flat = (rows + torch.arange(heads, device=device)) * self._capacity + self._positions[:, None]
            self._flat[key] = flat.reshape(-1)
        return self._flat[key]

    def _ensure(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        while len(self._keys) <= layer:
            self._keys.append(self._empty(keys))
            self._values.append(self._empty(values))

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros, not garbage: a masked position counts 0 · value, and 0 · NaN is NaN.
        return like.new_zeros(self._slots, like.shape[1], self._capacity, like.shape[3])

    def _grown(self, old: torch.Tensor) -> torch.Tensor:
        new = self._empty(old)
        new[:, :, : old.shape[2]] = old
        return new


class PrefillCache(Cache):
    """Collects what a forward over whole sequences computes: per layer K and V, [B, K, T, D]."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert layer_idx == len(self.states), "layers run in order"
        self.states.append((key_states, value_states))
        return key_states, value_states

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Zero: every forward says its positions itself."""
        return 0

    def sequence(self, row: int, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One sequence's K and V without its padding, [K, T, D] per layer."""
        return [(keys[row, :, :tokens], values[row, :, :tokens]) for keys, values in self.states]


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: query [B, H, T, D], key and value [B, K, L, D]; returns [B, T, H,
    D].

    With a mask ([B, 1, j, c], additive) it is one decode position per row over the slot cache; without,
    causal over whole sequences.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"rollout.engine=torch: {type(module).__name__} uses {name}.", "Use another engine."
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None:
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2), None
    rows, heads, _, size = query.shape
    kv_heads = key.shape[1]
    # A group's query heads share their K: one small product each, without expanding K and V.
    grouped_query = (query * scale).reshape(rows * kv_heads, heads // kv_heads, size)
    out = _decode(grouped_query, key.flatten(0, 1), value.flatten(0, 1), attention_mask)
    return out.view(rows, 1, heads, value.shape[-1]), None


def _decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """query [n·K, H/K, D], key and value [n·K, L, D], mask [n, 1, j, c]; returns [n·K, H/K, D]."""
    rows, _, steps, step = mask.shape
    keys, values = key.split(step, dim=1), value.split(step, dim=1)
    parts = [torch.bmm(query, part.transpose(1, 2)) for part in keys]
    scores = parts[0] if steps == 1 else torch.cat(parts, dim=-1)
    scores.view(rows, -1, steps * step).add_(mask.view(rows, 1, -1))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype).split(step, dim=-1)
    out = torch.bmm(weights[0], values[0])
    for weight, part in zip(weights[1:], values[1:], strict=True):
        out.baddbmm_(weight, part)
    return out


AttentionInterface.register(ATTENTION, slot_attention)
