"""The data of all stages, built before anything starts: whatever is wrong with a file is said while it is cheap."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from treadle.platform.errors import DataError
from treadle.platform.seeds import derive_seed
from treadle.workflows.configs import DistillConfig, GrpoConfig, PretrainConfig, SftConfig, StageConfig
from treadle.workflows.data.batches import RowList, RowSource
from treadle.workflows.data.corpus import TokenStream
from treadle.workflows.data.prompts import FilePrompts, GeneratedPrompts
from treadle.workflows.data.registry import PromptsConfig
from treadle.workflows.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInputs:
    """What a stage reads. `rows` are supervised, `train` and `heldout` are prompts; None where not needed."""

    rows: RowSource | None = None
    train: GeneratedPrompts | FilePrompts | None = None
    heldout: GeneratedPrompts | FilePrompts | None = None

    @property
    def skipped(self) -> int:
        """Broken rows that `skip_bad` left out of the stage's files."""
        sources = (self.rows, self.train or self.heldout)
        return sum(s.skipped for s in sources if isinstance(s, TokenStream | RowList | FilePrompts))


def stage_seed(recipe: Recipe, stage: str) -> int:
    """The seed of a stage, from the run's."""
    return derive_seed(recipe.seed, stage) % 2**31


def build_inputs(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, StageInputs]:
    """Reads every file once. Raises `DataError` naming file and line, or the prompt."""
    return {name: stage_inputs(recipe, tokenizer, name, stage) for name, stage in recipe.stages.items()}


def stage_inputs(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, name: str, stage: StageConfig
) -> StageInputs:
    """One stage's data."""
    seed, context = stage_seed(recipe, name), recipe.rollout.max_context_tokens
    if isinstance(stage, PretrainConfig):
        return StageInputs(rows=stage.corpus.build(tokenizer, context_tokens=stage.block_tokens, seed=seed))
    if isinstance(stage, SftConfig):
        heldout = _prompts(recipe, tokenizer, stage.prompts, "heldout", stage.evaluate.max_new_tokens, name)
        return StageInputs(
            rows=stage.pairs.build(tokenizer, context_tokens=context, seed=seed), heldout=heldout
        )
    if isinstance(stage, GrpoConfig | DistillConfig):
        train = _prompts(recipe, tokenizer, stage.prompts, "train", stage.max_new_tokens, name)
        heldout = _prompts(recipe, tokenizer, stage.prompts, "heldout", stage.evaluate.max_new_tokens, name)
        return StageInputs(train=train, heldout=heldout)
    return StageInputs()


def _prompts(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PromptsConfig,
    split: str,
    max_new_tokens: int,
    stage: str,
) -> GeneratedPrompts | FilePrompts:
    """Train and held-out sets share the run's seed, so that every stage evaluates on the same prompts."""
    room = recipe.rollout.max_context_tokens - max_new_tokens
    prompts = config.build(tokenizer, split=split, seed=recipe.seed, max_prompt_tokens=room)
    if len(prompts) == 0:
        raise DataError(
            f"stages.{stage}.prompts has no verifiable prompt in its {split} part.",
            "Check the data and heldout_fraction.",
        )
    for verifier in sorted(prompts.verifiers):
        recipe.verify.check_verifier(verifier, f"stages.{stage}.prompts")
    return prompts
