"""A Hugging Face causal language model as the torch engine sees it: prefill, decode, score, replace weights.

Letters: B sequences of one prefill, T tokens (padded) of each, n rows of one decode, V vocabulary,
L tokens that attention looks back over.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.kv_cache import ATTENTION, PrefillCache, SlotCache
from treadle.actors.rollout.llama_decode import LlamaDecode, looks_like_llama
from treadle.actors.rollout.packed_linear import pack_linears
from treadle.kernels.digest import state_digest
from treadle.platform.errors import ConfigError, DataError, MismatchError

_LOADING = threading.Lock()  # transformers loses track of tied weights when two threads load at once
States = list[tuple[torch.Tensor, torch.Tensor]]
"""One sequence's K and V, [K, T, D] per layer."""


def padded_tokens(tokens: int) -> int:
    """The length a sequence is prefilled at: it depends on the sequence alone, never on its neighbours."""
    step = 8 if tokens <= 32 else 32 if tokens <= 256 else 128
    return max(step, -(-tokens // step) * step)


class HfModel:
    """Model and tokenizer of one folder. `eos` are the ids that end a sequence."""

    def __init__(self, config: RolloutConfig, folder: str) -> None:
        self._device = config.device
        self._prefill_tokens = config.prefill_tokens
        transformers_logging.disable_progress_bar()
        self._model = _load_model(config, folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.eos = _eos_ids(self._model, self.tokenizer, folder)
        _check_context(self._model.config, config.max_context_tokens, folder)
        self.vocabulary = int(self._model.get_output_embeddings().weight.shape[0])
        self.batch_prefill = True
        """Whether sequences of one padded length share a forward; off where rows are not independent."""
        self._llama = self._written_out(config)
        # Without a decode step of its own, the model decodes with these; prefill alone does not need them.
        self._packed = [] if self._llama else pack_linears(self._model, config.slots)

    @property
    def packed_layers(self) -> int:
        """Linear layers of transformers' modules that compute with packed weights."""
        return len(self._packed)

    @property
    def decode_is_written_out(self) -> bool:
        """Whether decode steps go without transformers' modules."""
        return self._llama is not None

    def decode(
        self, tokens: torch.Tensor, positions: torch.Tensor, longest: int, cache: SlotCache
    ) -> torch.Tensor:
        """Logits [n, V] after `tokens` [n] at `positions` [n], whose K and V enter the cache."""
        span = cache.aim(positions, longest)
        if self._llama is not None:
            return self._llama(tokens, positions, cache)
        later = torch.arange(span, device=positions.device) > positions[:, None]
        mask = torch.zeros(later.shape, dtype=self._model.dtype, device=later.device)
        mask.masked_fill_(later, -torch.inf)
        out = self._model(
            input_ids=tokens[:, None],
            position_ids=positions[:, None],
            attention_mask=mask.view(len(tokens), 1, -1, cache.step_tokens),
            past_key_values=cache,
            use_cache=True,
        )
        return _tensor(out.logits)[:, 0]

    @torch.inference_mode()
    def _written_out(self, config: RolloutConfig) -> LlamaDecode | None:
        """The model's decode step without modules, if that gives the logits that the modules give: of three tokens,
        one right behind a common prefix, one in the middle of the context and one at its end."""
        self._llama = None
        if not looks_like_llama(self._model):
            return None
        context = config.max_context_tokens
        prefix = np.arange(min(7, context - 1), dtype=np.int32) % self.vocabulary
        positions = torch.tensor([len(prefix), context // 2, context - 1])
        tokens = torch.arange(3) % self.vocabulary
        logits = []
        for written in (None, LlamaDecode(self._model, context)):
            self._llama = written
            cache = SlotCache(3, config.kv_step_tokens)
            cache.put([0, 1, 2], self.prefill([prefix])[0])
            logits.append(self.decode(tokens, positions, context, cache))
        same = torch.allclose(logits[0], logits[1], rtol=0, atol=1e-4 * float(logits[0].abs().max()))
        return self._llama if same else None

    def prefill(self, sequences: Sequence[NDArray[np.int32]]) -> list[States]:
        """K and V of whole sequences, in their order."""
        found: list[States] = [[] for _ in sequences]
        for chosen in self._batches(sequences, self._prefill_tokens):
            cache = PrefillCache()
            self._forward(self._model.base_model, sequences, chosen, cache)
            for row, index in enumerate(chosen):
                found[index] = cache.sequence(row, len(sequences[index]))
        return found

    def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        """Of every token but each sequence's first given those before it, at temperature 1, concatenated."""
        found: list[NDArray[np.float32]] = [np.zeros(0, np.float32) for _ in sequences]
        budget = min(self._prefill_tokens, max(1, 2**27 // self.vocabulary))
        for chosen in self._batches(sequences, budget):
            ids, logits = self._forward(self._model, sequences, chosen, None)
            scores = torch.log_softmax(logits[:, :-1].float(), dim=-1)
            values = scores.gather(2, ids[:, 1:, None])[..., 0].cpu().numpy()
            for row, index in enumerate(chosen):
                found[index] = values[row, : len(sequences[index]) - 1]
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    def replace_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
        """Copies new weights into the parameters (ties stay tied) and returns the digest of what the model
        then holds under the given names. Raises `MismatchError` before anything is changed."""
        given = dict(tensors)
        held: dict[str, torch.Tensor] = self._model.state_dict(keep_vars=True)
        _check_weights(given, held)
        with torch.no_grad():
            for name, tensor in given.items():
                held[name].copy_(tensor)
            for layer in self._packed:
                layer.renew()
            if self._llama is not None:
                self._llama.renew()
        return state_digest((name, held[name].detach()) for name in given)

    def digest(self) -> str:
        """Of the weights held, each tied tensor once, under its first name."""
        return state_digest(_distinct(self._model.state_dict().items()))

    def _batches(self, sequences: Sequence[NDArray[np.int32]], budget: int) -> list[list[int]]:
        """Indices of sequences that share a padded length, within a budget of tokens per forward."""
        by_length: dict[int, list[int]] = {}
        for index, sequence in enumerate(sequences):
            if len(sequence):
                by_length.setdefault(padded_tokens(len(sequence)), []).append(index)
        batches = []
        for length, members in by_length.items():
            size = max(1, budget // length) if self.batch_prefill else 1
            batches += [members[i : i + size] for i in range(0, len(members), size)]
        return batches

    def _forward(
        self,
        model: Any,
        sequences: Sequence[NDArray[np.int32]],
        chosen: list[int],
        cache: PrefillCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [B, T], padded on the right where causal attention never looks, and the model's output [B, T,
        …]."""
        length = padded_tokens(max(len(sequences[index]) for index in chosen))
        host = np.zeros((len(chosen), length), dtype=np.int64)
        for row, index in enumerate(chosen):
            host[row, : len(sequences[index])] = sequences[index]
        ids = torch.from_numpy(host).to(self._device)
        positions = torch.arange(length, device=ids.device).expand(len(chosen), -1)
        out = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=cache is not None)
        return ids, out[0]


def _tensor(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value


def _load_model(config: RolloutConfig, folder: str) -> Any:
    if not Path(folder, "config.json").is_file():
        raise DataError(f"rollout: {folder} has no config.json.", "Give a Hugging Face model folder.")
    try:
        with _LOADING:
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, config.dtype),
                attn_implementation=ATTENTION,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"rollout: the model in {folder} cannot be loaded: {error}", "Check the model folder."
        ) from error
    # transformers fills what a file lacks with random numbers and only logs it.
    unset = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if unset:
        raise DataError(
            f"rollout: {folder} lacks {len(unset)} of the model's tensors, {unset[0]} first.",
            "Export the model again.",
        )
    if getattr(model, "_is_stateful", False) or not model._supports_attention_backend:
        raise ConfigError(
            f"rollout.engine=torch cannot run {type(model).__name__}: it keeps state outside a key-value cache.",
            "Use a decoder-only transformer, or another engine.",
        )
    return model.to(config.device).eval().requires_grad_(False)


def _eos_ids(model: Any, tokenizer: Any, folder: str) -> tuple[int, ...]:
    """Every id that any of the model's files calls end-of-sequence."""
    found: set[int] = set()
    for value in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    if not found:
        raise ConfigError(
            f"rollout: the tokenizer in {folder} has no EOS token.", "Set eos_token in tokenizer_config.json."
        )
    return tuple(sorted(found))


def _check_context(model_config: Any, max_context_tokens: int, folder: str) -> None:
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is not None and max_context_tokens > limit:
        raise ConfigError(
            f"rollout.max_context_tokens={max_context_tokens} exceeds the {limit} positions of {folder}.",
            f"Lower rollout.max_context_tokens to {limit}.",
        )
    window = getattr(model_config, "sliding_window", None)
    kinds = getattr(model_config, "layer_types", None) or (["sliding_attention"] if window else [])
    if window and "sliding_attention" in kinds and window < max_context_tokens:
        raise ConfigError(
            f"rollout.max_context_tokens={max_context_tokens} exceeds the sliding window of {window} in {folder}.",
            f"Lower rollout.max_context_tokens to {window}, or use another engine.",
        )


def _check_weights(given: dict[str, torch.Tensor], held: dict[str, torch.Tensor]) -> None:
    for name, tensor in given.items():
        if name not in held:
            raise MismatchError(
                f"rollout/adopt: the engine's model has no tensor {name}.", "Publish this model."
            )
        mine = held[name]
        if mine.shape != tensor.shape or mine.dtype != tensor.dtype:
            raise MismatchError(
                f"rollout/adopt: {name} is {tensor.dtype} {tuple(tensor.shape)}, the engine holds "
                f"{mine.dtype} {tuple(mine.shape)}.",
                "Set rollout.dtype to the dtype the learner publishes, and load the same model in both.",
            )
    covered = {held[name].data_ptr() for name in given}
    missing = [name for name, tensor in held.items() if tensor.data_ptr() not in covered]
    if missing:
        raise MismatchError(
            f"rollout/adopt: {len(missing)} tensors were not published, {missing[0]} first.",
            "Publish every parameter and persistent buffer.",
        )


def _distinct(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
    seen: set[int] = set()
    for name, tensor in tensors:
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield name, tensor
