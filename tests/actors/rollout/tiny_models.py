"""Small Qwen2 models with a symbol tokenizer, written as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from treadle.platform.records import Issue, Prompt, Sampling, WeightVersion

SPECIAL = ("<pad>", "<eos>", "<think>", "</think>", "<answer>", "</answer>")
CHARACTERS = "0123456789+-*/=()<>,. abcdefghijklm"


def write_model(
    folder: Path,
    *,
    layers: int = 2,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    tied: bool = True,
    positions: int = 512,
    spread: float = 0.4,
) -> str:
    """A model with random weights (`spread` is their standard deviation: large enough that next-token
    distributions differ between contexts)."""
    tokenizer = symbol_tokenizer()
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=spread,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def symbol_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character or tag."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=list(SPECIAL[2:]),
        clean_up_tokenization_spaces=False,
    )


def issue(
    name: str,
    *,
    prompt: str = "12+34=",
    group_size: int = 4,
    max_new_tokens: int = 20,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 7,
    stop: Sequence[str] = (),
    step: int = 0,
    issue_id: str = "",
) -> Issue:
    """An issue of prompt id `name`."""
    tokens = symbol_tokenizer()(prompt)["input_ids"]
    return Issue(
        id=issue_id or f"test/{name}",
        prompt=Prompt(
            id=name, text=prompt, token_ids=np.array(tokens, dtype=np.int32), verifier="exact", payload={}
        ),
        sampling=Sampling(
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            group_size=group_size,
            seed=seed,
            stop=tuple(stop),
        ),
        version=WeightVersion(step=step),
    )
