"""The engines, by name. A new engine is one file with a `build` function and one line here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from treadle.platform.errors import DataError
from treadle.platform.records import Issue, Sample, WeightVersion

if TYPE_CHECKING:
    from treadle.actors.rollout.config import RolloutConfig
    from treadle.platform.contracts import Engine

# Imported on use: an engine's library need not be installed where another engine runs.
ENGINES = {
    "torch": "treadle.actors.rollout.torch_engine:build",
    "vllm": "treadle.actors.rollout.vllm_engine:build",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedSample:
    """A finished row, as `contracts.EngineSample`.

    Example: `FinishedSample(issue_id="grpo/00000012", sample=Sample(index=3, …), text="<think>…</answer>")`.
    """

    issue_id: str
    sample: Sample
    text: str


class BuildEngine(Protocol):
    """Makes an engine that holds the model of a Hugging Face folder, as weights of `version`."""

    def __call__(self, config: RolloutConfig, model_folder: str, version: WeightVersion) -> Engine: ...


@runtime_checkable
class FixedShapes(Protocol):
    """What an engine says that promises the same bits to a row in any company, if it keeps that promise only by
    computing all slots each time. Engines that say nothing do not depend on slots, or promise no bits."""

    @property
    def slots_matter(self) -> bool: ...


def check_fits(issue: Issue, max_context_tokens: int, vocabulary: int) -> None:
    """Raises `DataError` naming the prompt when an engine with this context and vocabulary cannot draw it."""
    prompt, new = issue.prompt, issue.sampling.max_new_tokens
    tokens = len(prompt.token_ids)
    if tokens == 0:
        raise DataError(f"rollout/draw: prompt {prompt.id} is empty.", "Remove it from the data.")
    if tokens + new > max_context_tokens:
        raise DataError(
            f"rollout/draw: prompt {prompt.id} of {tokens} tokens plus max_new_tokens={new} exceeds "
            f"rollout.max_context_tokens={max_context_tokens}.",
            "Shorten the prompt, lower sampling.max_new_tokens or raise rollout.max_context_tokens.",
        )
    if (largest := int(prompt.token_ids.max())) >= vocabulary:
        raise DataError(
            f"rollout/draw: prompt {prompt.id} holds token {largest}, the model knows {vocabulary}.",
            "Tokenize the prompts with the model's own tokenizer.",
        )


def build_engine(config: RolloutConfig, model_folder: str, version: WeightVersion) -> Engine:
    """Raises `ConfigError` for a model the engine cannot run, `DataError` for a folder without one."""
    module, _, function = ENGINES[config.engine].partition(":")
    build: BuildEngine = getattr(importlib.import_module(module), function)
    return build(config, model_folder, version)
