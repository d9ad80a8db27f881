"""Token streams for pretraining: documents joined with EOS, packed into blocks of equal length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from treadle.platform.errors import ConfigError, DataError
from treadle.platform.seeds import derive_seed
from treadle.workflows.data.batches import TokenRow
from treadle.workflows.data.generators.base import Generator
from treadle.workflows.data.generators.registry import generator_field
from treadle.workflows.data.permutation import Epochs
from treadle.workflows.data.pool import MAX_TASKS, TaskPool, require_split
from treadle.workflows.data.rows import Row, read_rows, text_field
from treadle.workflows.data.tokenization import encode_many, require_eos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 4096
_INT32 = np.dtype(np.int32)


class TokenStream:
    """Blocks of T = `context_tokens` tokens, in an order that follows from the seed.

    Neighbouring blocks share one token: the last of a block is a target there and the first context of the
    next, so every token but the stream's first is a target exactly once in an epoch. The rest behind the last
    whole block is left out. A block attends over the documents it holds, as usual in pretraining.
    """

    def __init__(
        self, tokens: NDArray[np.int32], *, context_tokens: int, seed: int, skipped: int = 0
    ) -> None:
        if context_tokens < 2:
            raise ConfigError(f"context_tokens={context_tokens} leaves no target.", "Raise it to 2 or more.")
        self.tokens, self.skipped, self._length = tokens, skipped, context_tokens
        self._blocks = (len(tokens) - 1) // (context_tokens - 1)
        if self._blocks < 1:
            raise DataError(
                f"The corpus has {len(tokens)} tokens, less than one block of {context_tokens}.",
                "Give more text, or lower the context.",
            )
        self._order = Epochs(self._blocks, "blocks", seed)
        self._mask = np.ones(context_tokens, dtype=np.bool_)
        self._mask[0] = False

    def __len__(self) -> int:
        return self._blocks

    def at(self, index: int) -> TokenRow:
        start = self._order.at(index) * (self._length - 1)
        return TokenRow(token_ids=self.tokens[start : start + self._length], loss_mask=self._mask)


def joined(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[tuple[str, str]], at_least: int | None = None
) -> NDArray[np.int32]:
    """Tokens of all (where, text) documents, each followed by EOS, and led by BOS if the tokenizer has one; stops
    once there are `at_least` tokens. Raises DataError naming the document that cannot be encoded."""
    eos = np.array([require_eos(tokenizer, tokenizer.name_or_path)], dtype=_INT32)
    bos = np.array([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], dtype=_INT32)
    pieces: list[NDArray[np.int32]] = []
    total = 0
    source = iter(documents)
    while chunk := list(islice(source, _CHUNK)):
        names = [where for where, _ in chunk]
        for tokens in encode_many(tokenizer, [text for _, text in chunk], names.__getitem__):
            pieces += [bos, tokens, eos]
            total += len(bos) + len(tokens) + 1
            if at_least is not None and total >= at_least:
                return np.concatenate(pieces)
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=_INT32)


def generated_documents(pool: TaskPool, seed: int) -> Iterator[tuple[str, str]]:
    """Endless corpus lines about the pool's tasks."""
    chunk = 0
    while True:
        key = derive_seed("corpus", seed, chunk)
        draws = np.random.Generator(np.random.Philox(key=key)).integers(0, 2**63, _CHUNK)
        for i, draw in enumerate(draws):
            number = pool.number_at(chunk * _CHUNK + i)
            yield f"task {number}", pool.generator.corpus_line(number, int(draw))
        chunk += 1


@dataclass(frozen=True, kw_only=True)
class GeneratedCorpusConfig:
    """Text about a generator's training tasks, in another wording than prompts and chains."""

    kind: str = "generator"
    generator: Generator = generator_field()
    heldout_fraction: float = 0.1
    """Must be the prompts': no line is about a held-out task."""
    tokens: int = 200_000
    """Tokens of one epoch."""
    max_tasks: int = MAX_TASKS

    def build(self, tokenizer: PreTrainedTokenizerBase, *, context_tokens: int, seed: int) -> TokenStream:
        """Writes and tokenises one epoch."""
        pool = TaskPool(self.generator, "train", self.heldout_fraction, seed, self.max_tasks)
        tokens = joined(tokenizer, generated_documents(pool, seed), at_least=self.tokens)
        return TokenStream(tokens, context_tokens=context_tokens, seed=seed)

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work."""
        require_split("all", self.heldout_fraction)
        if self.tokens < 2:
            raise ConfigError(f"tokens={self.tokens} is no corpus.", "Ask for as many as training will read.")


@dataclass(frozen=True, kw_only=True)
class FileCorpusConfig:
    """Documents from JSON lines (field `text`), Parquet (column `text`) or plain text (`.txt`, a document per
    line) at any fsspec URLs. Tokenised once, at 4 bytes a token in the driver's memory."""

    kind: str = "file"
    urls: list[str] = field(default_factory=list)
    text_field: str = "text"
    skip_bad: bool = False
    """Count broken rows and leave them out, instead of refusing the file."""

    def build(self, tokenizer: PreTrainedTokenizerBase, *, context_tokens: int, seed: int) -> TokenStream:
        """Reads all files in the given order. Raises DataError naming file and line of what is wrong."""
        files = [read_rows(url, self._document, skip_bad=self.skip_bad) for url in self.urls]
        documents = [document for file in files for document in file.items]
        skipped = sum(file.skipped for file in files)
        return TokenStream(
            joined(tokenizer, documents), context_tokens=context_tokens, seed=seed, skipped=skipped
        )

    def _document(self, row: Row, where: str) -> tuple[str, str]:
        return where, text_field(row, self.text_field, where)

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work."""
        if not self.urls:
            raise ConfigError("urls is empty, so there is no corpus.", "Name at least one file.")
