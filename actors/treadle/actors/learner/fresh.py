"""A model from random weights. A rank makes it, because it has the libraries loaded already."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from treadle.actors.learner.imports import import_transformers
from treadle.platform.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A transformers model type and its sizes; the ids are the tokenizer's."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    context_tokens: int
    tie_embeddings: bool
    initializer_range: float
    vocabulary: int
    eos_id: int
    bos_id: int | None
    pad_id: int | None


def random_model(shape: ModelShape, target: str, seed: int) -> None:
    """Writes config.json and model.safetensors in fp32 into the local folder `target`, which appears complete.
    The same seed gives the same bytes. Raises `ConfigError` for an architecture transformers does not know."""
    import torch  # here: the driver knows `ModelShape` and needs neither

    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.for_model(
            shape.architecture,
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.context_tokens,
            tie_word_embeddings=shape.tie_embeddings,
            initializer_range=shape.initializer_range,
            bos_token_id=shape.bos_id,
            eos_token_id=shape.eos_id,
            pad_token_id=shape.pad_id,
        )
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(
            f"model.architecture={shape.architecture} is no causal language model: {reason}",
            "Use a transformers model type such as qwen2, llama or mistral.",
        ) from error
    transformers.utils.logging.disable_progress_bar()
    draft = Path(target).with_name(Path(target).name + ".draft")
    model.save_pretrained(draft)
    draft.replace(target)
