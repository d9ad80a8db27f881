"""The policy: a Hugging Face causal LM asked for log-probabilities and entropies of drawn tokens only.

The base model's hidden states go through the head with `linear_logprob`, so the logits of a micro-batch never
exist as a whole. Everything happens inside module forwards: ZeRO-3 gathers a module's parameters before its
forward and again before its backward pass, and the head is a module that owns its weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from treadle.actors.learner.attention import LAYOUT, PACKED, register
from treadle.actors.learner.imports import import_transformers
from treadle.actors.learner.packing import PackedBatch
from treadle.kernels.linear_logprob import linear_logprob
from treadle.platform.errors import ConfigError, DataError

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PREFIX = "model."


class PolicyOutput(NamedTuple):
    """A tuple, so that wrappers which hook a module's outputs find the tensors."""

    logprobs: Tensor  # [n] fp32
    entropy: Tensor  # [n] fp32, no gradient


class LogprobHead(nn.Module):
    """The output projection, under the names it has in the Hugging Face model."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        weight, bias = head.weight, getattr(head, "bias", None)
        assert isinstance(weight, nn.Parameter)
        self.weight = weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, hidden: Tensor, targets: Tensor, temperature: float) -> PolicyOutput:
        return PolicyOutput(
            *linear_logprob(hidden, self.weight, targets, bias=self.bias, temperature=temperature)
        )


class PolicyModel(nn.Module):
    """`model` is the Hugging Face model with its head replaced; its parameter names are the published
    ones."""

    def __init__(self, model: Any, *, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.logit_scale = _logit_scale(model.config)
        head = model.get_output_embeddings()
        if head is None:
            raise DataError(f"{type(model).__name__} has no output head.", "Use a causal language model.")
        model.set_output_embeddings(LogprobHead(head))
        self.model = model

    def forward(self, batch: PackedBatch, temperature: float = 1.0) -> PolicyOutput:
        """Log-probabilities and entropies [n] of the batch's targets at `temperature`."""
        hidden = self._packed_hidden(batch) if self.packed else self._padded_hidden(batch)
        chosen = hidden.index_select(0, batch.target_index)
        output = self.model.get_output_embeddings()(chosen, batch.targets, temperature / self.logit_scale)
        assert isinstance(output, PolicyOutput)
        return output

    def _packed_hidden(self, batch: PackedBatch) -> Tensor:
        """[N, D] from one packed row."""
        out = self.model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            **{LAYOUT: batch.layout},
        )
        return _tensor(out.last_hidden_state[0])

    def _padded_hidden(self, batch: PackedBatch) -> Tensor:
        """[N, D] through a padded [S, L] batch. Padding lies at the end, where causal attention of the
        sequence itself never looks, so the model needs no mask."""
        index = batch.layout.padded_index
        out = self.model.base_model(input_ids=batch.input_ids[index], use_cache=False)
        hidden = _tensor(out.last_hidden_state)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.layout.packed_index)

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained parameters by Hugging Face name, each once (tied weights under their first name)."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                yield name.removeprefix(PREFIX), parameter


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def _logit_scale(config: Any) -> float:
    """Factor between the head's output and the model's logits; refuses what the head cannot express."""
    if getattr(config, "final_logit_softcapping", None):
        raise ConfigError(
            f"{config.model_type} caps its logits (final_logit_softcapping); the learner does not.",
            "Use a model without soft-capping.",
        )
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    return scale / float(getattr(config, "logits_scaling", None) or 1.0)


def load_policy(
    folder: str, *, dtype: str, packing: str, checkpointing: bool = False, reentrant: bool = False
) -> PolicyModel:
    """The policy of a Hugging Face folder. `packed` falls back to padded batches for a model that does not
    use the attention interface. Dropout is off: a step must be a function of its batch."""
    transformers = import_transformers()
    transformers.utils.logging.disable_progress_bar()
    if not (Path(folder) / "config.json").is_file():
        raise DataError(
            f"Model folder {folder} has no config.json.", "Point the stage at a Hugging Face folder."
        )
    register()
    packed = packing == "packed"
    if packed:
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        packed = bool(getattr(kind, "_supports_attention_backend", False))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=TORCH_DTYPES[dtype], attn_implementation=PACKED if packed else "sdpa"
    )
    model.config.use_cache = False
    _switch_off_dropout(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    return PolicyModel(model, packed=packed)


def _switch_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
