"""Prompt and completion pairs for SFT and distillation: the prompt is context, the completion the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from treadle.platform.errors import ConfigError, DataError
from treadle.workflows.data.batches import RowList, TokenRow
from treadle.workflows.data.generators.base import Generator
from treadle.workflows.data.generators.registry import generator_field
from treadle.workflows.data.pool import MAX_TASKS, TaskPool, require_split
from treadle.workflows.data.prompts import filled, require_template
from treadle.workflows.data.rows import SKIP, Row, read_rows, text_field
from treadle.workflows.data.tokenization import encode_many, require_eos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A completion to imitate. `where` names it in errors."""

    where: str
    prompt: str
    completion: str


def pair_rows(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, context_tokens: int
) -> list[TokenRow]:
    """Prompt tokens, completion tokens and EOS; the completion and EOS are the targets.

    Both parts are tokenised on their own, so that the prompt's tokens are those the policy sees when it
    draws. Raises DataError naming a pair that does not fit into the context.
    """
    eos = np.array([require_eos(tokenizer, tokenizer.name_or_path)], dtype=np.int32)
    where = [pair.where for pair in pairs].__getitem__
    prompts = encode_many(tokenizer, [pair.prompt for pair in pairs], where)
    completions = encode_many(tokenizer, [pair.completion for pair in pairs], where)
    rows = []
    for pair, prompt, completion in zip(pairs, prompts, completions, strict=True):
        tokens = np.concatenate([prompt, completion, eos])
        if len(tokens) > context_tokens:
            raise DataError(
                f"{pair.where}: prompt and completion have {len(tokens)} tokens, but the context is "
                f"{context_tokens}.",
                "Shorten or remove the pair, or raise the context.",
            )
        mask = np.arange(len(tokens)) >= max(len(prompt), 1)
        rows.append(TokenRow(token_ids=tokens, loss_mask=mask))
    return rows


@dataclass(frozen=True, kw_only=True)
class GeneratedPairsConfig:
    """A generator's worked chains, as cold-start data."""

    kind: str = "generator"
    generator: Generator = generator_field()
    heldout_fraction: float = 0.1
    """Must be the prompts': no chain is about a held-out task."""
    pairs: int = 2000
    """Distinct tasks; capped by what the training part has."""
    template: str = "{prompt}"
    max_tasks: int = MAX_TASKS

    def build(self, tokenizer: PreTrainedTokenizerBase, *, context_tokens: int, seed: int) -> RowList:
        """The first `pairs` tasks of the seed's order."""
        pool = TaskPool(self.generator, "train", self.heldout_fraction, seed, self.max_tasks)
        tasks = [pool.at(i) for i in range(min(self.pairs, len(pool)))]
        pairs = [
            Pair(where=task.id, prompt=filled(self.template, task.text), completion=task.completion)
            for task in tasks
        ]
        return RowList(pair_rows(tokenizer, pairs, context_tokens=context_tokens), seed=seed)

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work."""
        require_split("all", self.heldout_fraction)
        require_template(self.template)
        if self.pairs < 1:
            raise ConfigError(f"pairs={self.pairs} leaves nothing to learn from.", "Ask for 1 or more.")


@dataclass(frozen=True, kw_only=True)
class FilePairsConfig:
    """Pairs from JSON lines or Parquet at any fsspec URL."""

    kind: str = "file"
    url: str = "???"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    skip_bad: bool = False
    """Count broken rows and pairs longer than the context and leave them out, instead of refusing the
    file."""
    template: str = "{prompt}"

    def build(self, tokenizer: PreTrainedTokenizerBase, *, context_tokens: int, seed: int) -> RowList:
        """Reads the whole file. Raises DataError naming file and line of what is wrong."""

        def parse(row: Row, where: str) -> TokenRow:
            prompt = filled(self.template, text_field(row, self.prompt_field, where))
            pair = Pair(where=where, prompt=prompt, completion=text_field(row, self.completion_field, where))
            return pair_rows(tokenizer, [pair], context_tokens=context_tokens)[0]

        rows = read_rows(self.url, parse, skip_bad=self.skip_bad)
        if not rows.items:
            raise DataError(f"{self.url}: all {rows.skipped} rows are broken.", SKIP)
        return RowList(rows.items, seed=seed, skipped=rows.skipped)

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work."""
        require_template(self.template)
