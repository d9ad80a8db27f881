"""The decode step that is written out: which models get it, and that they draw what transformers would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.actors.rollout.test_torch_engine import assert_same_bits, draw_all, engine_of, plain_sample
from tests.actors.rollout.tiny_models import issue, symbol_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.hf_model import HfModel
from treadle.kernels import native
from treadle.platform.records import WeightVersion

LLAMA_FAMILY = (Qwen2Config, LlamaConfig, MistralConfig, Qwen3Config)


def write(folder: Path, kind: type[PreTrainedConfig], *, seed: int = 0, **changes: Any) -> str:
    tokenizer = symbol_tokenizer()
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    config = kind(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **({"sliding_window": None} if kind is MistralConfig else {}),
        **(shape | changes),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", LLAMA_FAMILY)
def test_the_llama_family_draws_what_a_plain_loop_draws(tmp_path: Path, kind: type[PreTrainedConfig]) -> None:
    folder = write(tmp_path, kind)
    engine = engine_of(folder)
    assert engine._model.decode_is_written_out
    one = issue("a", group_size=3, max_new_tokens=40)
    found = draw_all(engine, [one])
    for index in range(3):
        sample = found[one.id, index].sample
        tokens, logprobs = plain_sample(folder, one, index)
        assert sample.token_ids.tolist() == tokens
        np.testing.assert_allclose(sample.logprobs[sample.loss_mask], logprobs, atol=1e-4)


def test_large_models_keep_their_plain_weights_for_prefill(tmp_path: Path) -> None:
    folder = write(tmp_path, Qwen2Config, intermediate_size=6144)
    model = HfModel(RolloutConfig(max_context_tokens=96), folder)
    assert model.decode_is_written_out
    assert model.packed_layers == 0
    one = issue("a", group_size=1, max_new_tokens=12)
    sample = draw_all(engine_of(folder), [one])[one.id, 0].sample
    assert sample.token_ids.tolist() == plain_sample(folder, one, 0)[0]


def test_samples_are_the_same_alone_and_in_company(tmp_path: Path) -> None:
    folder = write(tmp_path, Qwen3Config)
    asked = [issue(f"p{i}", prompt=p, max_new_tokens=30) for i, p in enumerate(("1+1=", "12+34=", "9"))]
    together = draw_all(engine_of(folder, slots=16, row_block=1), asked)
    for one in asked:
        for key, alone in draw_all(engine_of(folder, slots=4, row_block=2), [one]).items():
            assert_same_bits(together[key].sample, alone.sample)


def test_new_weights_are_decoded_with_at_once(tmp_path: Path) -> None:
    old, new = write(tmp_path / "a", Qwen2Config), write(tmp_path / "b", Qwen2Config, seed=1)
    engine, one = engine_of(old), issue("a", group_size=2)
    draw_all(engine, [one])
    engine.adopt(WeightVersion(step=1), iter(AutoModelForCausalLM.from_pretrained(new).state_dict().items()))
    found, fresh = draw_all(engine, [one]), draw_all(engine_of(new), [one])
    for key, finished in fresh.items():
        np.testing.assert_array_equal(found[key].sample.token_ids, finished.sample.token_ids)
        np.testing.assert_array_equal(found[key].sample.logprobs, finished.sample.logprobs)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (GemmaConfig, {}),  # norms that add one, another activation, scaled embeddings
        (GraniteConfig, {"residual_multiplier": 0.5}),  # the same parts, put together in another way
        (LlamaConfig, {"hidden_act": "gelu"}),
        (LlamaConfig, {"head_dim": 24}),
    ],
)
def test_models_that_are_built_otherwise_decode_with_their_own_modules(
    tmp_path: Path, kind: type[PreTrainedConfig], changes: dict[str, Any]
) -> None:
    folder = write(tmp_path, kind, **changes)
    engine = engine_of(folder)
    assert not engine._model.decode_is_written_out
    one = issue("a", group_size=1, max_new_tokens=8)
    assert draw_all(engine, [one])[one.id, 0].sample.token_ids.tolist() == plain_sample(folder, one, 0)[0]


def test_without_compiled_kernels_models_decode_with_their_own_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "library", lambda device: None)
    folder = write(tmp_path, Qwen2Config)
    assert not HfModel(RolloutConfig(max_context_tokens=96), folder).decode_is_written_out
