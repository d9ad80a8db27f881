"""Prompts from a generator and from files: the `Prompts` contract."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treadle.platform.errors import ConfigError, DataError
from treadle.platform.records import Json, Prompt
from treadle.workflows.data.generators.base import Generator
from treadle.workflows.data.generators.registry import generator_field
from treadle.workflows.data.permutation import Epochs
from treadle.workflows.data.pool import MAX_TASKS, TaskPool, require_split
from treadle.workflows.data.rows import SKIP, Row, payload_field, read_rows, text_field
from treadle.workflows.data.split import in_split
from treadle.workflows.data.tokenization import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBES = 256
"""Generated prompts tried out when the source is made, so that a character or length that cannot work shows
before a run starts. Prompts from files are all tried."""


def filled(template: str, prompt: str) -> str:
    """The prompt in its template. Plain replacement: other braces are text."""
    return template.replace("{prompt}", prompt)


def require_template(template: str) -> None:
    """Raises ConfigError when the template has not exactly one place for the prompt."""
    if template.count("{prompt}") != 1:
        raise ConfigError(
            f"template={template!r} holds {{prompt}} {template.count('{prompt}')} times.",
            "Write {prompt} once, where the prompt goes.",
        )


def fitting(prompt: Prompt, max_prompt_tokens: int | None) -> Prompt:
    """The prompt itself. Raises DataError naming it when it leaves no room for a completion."""
    if max_prompt_tokens is not None and len(prompt.token_ids) > max_prompt_tokens:
        raise DataError(
            f"Prompt {prompt.id} has {len(prompt.token_ids)} tokens, but context minus max_new_tokens leaves "
            f"{max_prompt_tokens}.",
            "Shorten or remove the prompt, raise the context, or lower max_new_tokens.",
        )
    return prompt


class GeneratedPrompts:
    """Prompts of a generator's split, in an order that follows from the seed. `at` raises DataError for a
    prompt that has a character without a token or leaves no room for a completion."""

    def __init__(
        self,
        pool: TaskPool,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "{prompt}",
        max_prompt_tokens: int | None = None,
    ) -> None:
        require_template(template)
        self._pool, self._tokenizer, self._template = pool, tokenizer, template
        self._max_prompt_tokens = max_prompt_tokens
        for index in range(min(len(pool), _PROBES)):
            self.at(index)

    def __len__(self) -> int:
        return len(self._pool)

    @property
    def verifiers(self) -> frozenset[str]:
        """Names of the verifiers these prompts ask for."""
        return frozenset({self._pool.at(0).verifier})

    def at(self, index: int) -> Prompt:
        task = self._pool.at(index)
        text = filled(self._template, task.text)
        prompt = Prompt(
            id=task.id,
            text=text,
            token_ids=encode(self._tokenizer, text, f"prompt {task.id}"),
            verifier=task.verifier,
            payload=task.payload,
        )
        return fitting(prompt, self._max_prompt_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """A row of a prompt file that passed its checks."""

    id: str
    text: str
    verifier: str
    payload: Mapping[str, Json]


class FilePrompts:
    """Prompts of a file's split, in an order that follows from the seed. `skipped` counts broken rows."""

    def __init__(
        self,
        rows: Sequence[PromptRow],
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        template: str = "{prompt}",
        max_prompt_tokens: int | None = None,
        skipped: int = 0,
    ) -> None:
        require_template(template)
        self._rows, self._tokenizer, self._template, self.skipped = rows, tokenizer, template, skipped
        self._max_prompt_tokens = max_prompt_tokens
        self._order = Epochs(len(rows), "prompts", seed)
        for row in rows:
            self._prompt(row)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def verifiers(self) -> frozenset[str]:
        """Names of the verifiers these prompts ask for."""
        return frozenset(row.verifier for row in self._rows)

    def at(self, index: int) -> Prompt:
        return self._prompt(self._rows[self._order.at(index)])

    def _prompt(self, row: PromptRow) -> Prompt:
        text = filled(self._template, row.text)
        prompt = Prompt(
            id=row.id,
            text=text,
            token_ids=encode(self._tokenizer, text, f"prompt {row.id}"),
            verifier=row.verifier,
            payload=row.payload,
        )
        return fitting(prompt, self._max_prompt_tokens)


@dataclass(frozen=True, kw_only=True)
class GeneratedPromptsConfig:
    """Prompts made by a generator."""

    kind: str = "generator"
    generator: Generator = generator_field()
    heldout_fraction: float = 0.1
    """Part of the tasks that is never trained on, chosen by a hash of their content."""
    template: str = "{prompt}"
    max_tasks: int = MAX_TASKS
    """Larger spaces are represented by this many tasks."""

    def build(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        split: str,
        seed: int,
        max_prompt_tokens: int | None = None,
    ) -> GeneratedPrompts:
        """`split` is train, heldout or all; `max_prompt_tokens` is the context minus max_new_tokens."""
        pool = TaskPool(self.generator, split, self.heldout_fraction, seed, self.max_tasks)
        return GeneratedPrompts(pool, tokenizer, template=self.template, max_prompt_tokens=max_prompt_tokens)

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work."""
        require_split("all", self.heldout_fraction)
        require_template(self.template)


@dataclass(frozen=True, kw_only=True)
class FilePromptsConfig:
    """Prompts from JSON lines or Parquet at any fsspec URL.

    Fields of a row: `prompt`; `answer` and/or `payload` (an object for the verifier; `answer` goes into it);
    optional `id` and `verifier`. A row without an id is named after its content.
    """

    kind: str = "file"
    url: str = "???"
    verifier: str = "exact"
    """Verifier of rows that name none."""
    heldout_fraction: float = 0.1
    """Part of the prompts that is never trained on, chosen by a hash of their text; 0 for a file that is
    wholly one or the other."""
    skip_bad: bool = False
    """Count broken rows and leave them out, instead of refusing the file."""
    template: str = "{prompt}"

    def build(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        split: str,
        seed: int,
        max_prompt_tokens: int | None = None,
    ) -> FilePrompts:
        """Reads the whole file. Raises DataError naming file and line of what is wrong."""
        require_split(split, self.heldout_fraction)
        rows = read_rows(self.url, _PromptParser(self.verifier), skip_bad=self.skip_bad)
        chosen = [row for row in rows.items if in_split(row.text, split, self.heldout_fraction)]
        if not chosen:
            raise DataError(
                f"{self.url} has no verifiable prompt in its {split} part ({len(rows.items)} usable rows, "
                f"{rows.skipped} broken, heldout_fraction={self.heldout_fraction}).",
                "Give every row a prompt and an answer or payload, and check heldout_fraction.",
            )
        return FilePrompts(
            chosen,
            tokenizer,
            seed=seed,
            template=self.template,
            max_prompt_tokens=max_prompt_tokens,
            skipped=rows.skipped,
        )

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work."""
        require_split("all", self.heldout_fraction)
        require_template(self.template)


class _PromptParser:
    """Turns rows into prompts and remembers ids, because seeds and the ledger rely on them being unique."""

    def __init__(self, verifier: str) -> None:
        self._verifier = verifier
        self._seen: dict[str, str] = {}

    def __call__(self, row: Row, where: str) -> PromptRow:
        text = text_field(row, "prompt", where)
        name = self._id(row, text, where)
        verifier = text_field(row, "verifier", where) if "verifier" in row else self._verifier
        parsed = PromptRow(id=name, text=text, verifier=verifier, payload=payload_field(row, where))
        if name in self._seen:
            raise DataError(f"{where}: the id {name!r} is already used at {self._seen[name]}.", SKIP)
        self._seen[name] = where
        return parsed

    def _id(self, row: Row, text: str, where: str) -> str:
        if "id" not in row:
            return "prompt-" + hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        value = row["id"]
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            raise DataError(f'{where}: the field "id" is {value!r}; it must be a text or an integer.', SKIP)
        return str(value)
