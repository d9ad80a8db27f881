"""A model whose completions have long-tailed lengths by construction, for benchmarks of generation.

Its weights spell out a Markov chain over characters. Embeddings are orthogonal, the layers' contributions to the
residual stream are small, and row n of the output layer is Σ_t log P(n|t) e_t, so that after the final norm the
logits are log P(·|t) plus small noise. All layers are computed like any others, and trained.

The chain: `=` opens `<think>`; each thought is a symbol out of `2`…`9`, and after each one the thinking ends with
probability `1 / mean_thought`, which makes lengths geometric; the answer is `0` or `1` with even odds; then EOS.
So the R1 form and an exact answer can be verified, and groups have a spread of rewards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

THOUGHTS = "23456789"
ANSWERS = "01"
_NEVER = 1e-9
"""Probability of what the chain does not do; its logarithm must stay finite."""
_NOISE = 1e-3
"""Standard deviation of the layers' output projections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a Qwen2."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    context_tokens: int


def transitions(mean_thought: float) -> dict[str, dict[str, float]]:
    """P(next|current) of the chain, by token text. Every row sums to 1; other tokens behave like `=`."""
    end = 1.0 / mean_thought
    think = {symbol: (1.0 - end) / len(THOUGHTS) for symbol in THOUGHTS}
    return {
        "=": {"<think>": 1.0},
        "<think>": {symbol: 1.0 / len(THOUGHTS) for symbol in THOUGHTS},
        **{symbol: {**think, "</think>": end} for symbol in THOUGHTS},
        "</think>": {"<answer>": 1.0},
        "<answer>": {symbol: 1.0 / len(ANSWERS) for symbol in ANSWERS},
        **{symbol: {"</answer>": 1.0} for symbol in ANSWERS},
        "</answer>": {"<eos>": 1.0},
    }


def log_transitions(chain: Mapping[str, Mapping[str, float]], vocabulary: Mapping[str, int]) -> torch.Tensor:
    """[V, V] log P(column|row)."""
    logs = torch.full((len(vocabulary), len(vocabulary)), math.log(_NEVER))
    for text, row in vocabulary.items():
        for following, probability in chain.get(text, chain["="]).items():
            logs[row, vocabulary[following]] = math.log(probability)
    return logs


def write_markov_model(
    folder: Path, tokenizer: PreTrainedTokenizerBase, shape: Shape, mean_thought: float
) -> int:
    """Saves model and tokenizer as a Hugging Face folder and returns the number of parameters."""
    torch.manual_seed(0)
    vocabulary = tokenizer.get_vocab()
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(vocabulary),
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.context_tokens,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    basis = torch.linalg.qr(torch.randn(shape.hidden, len(vocabulary))).Q.T  # [V, d], rows orthonormal
    scale = math.sqrt(shape.hidden)  # of a vector whose elements have mean square 1, as after the final norm
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(basis * scale)
        model.lm_head.weight.copy_(log_transitions(transitions(mean_thought), vocabulary).T @ basis / scale)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.normal_(0.0, _NOISE)
            layer.mlp.down_proj.weight.normal_(0.0, _NOISE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
