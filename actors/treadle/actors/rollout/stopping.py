"""Where a row ends: a table over the vocabulary finds candidates without a loop, text decides on the few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from treadle.platform.records import StopReason

_GOES_ON, _MAYBE, _EOS = 0, 1, 2
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # a token that is part of a character decodes to this


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that engines use."""

    def __len__(self) -> int: ...

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str: ...


class Stops:
    """The stop rules seen so far. Rows name theirs by number: rule 0 is EOS alone."""

    def __init__(self, tokenizer: Tokenizer, eos: Sequence[int], vocabulary: int, device: str) -> None:
        self._tokenizer = tokenizer
        self._device = device
        self._rules: dict[tuple[str, ...], int] = {}
        base = torch.zeros(1, vocabulary, dtype=torch.int8)
        base[0, list(eos)] = _EOS
        self._table = base.to(device)
        self._pieces: list[str] | None = None
        self._rules[()] = 0

    def rule(self, stop: tuple[str, ...]) -> int:
        """The number of a set of stop strings."""
        if stop not in self._rules:
            self._rules[stop] = len(self._table)
            self._table = torch.cat([self._table, self._row(stop)[None]])
        return self._rules[stop]

    def classify(self, rules: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """[n] int8: 0 where a row surely goes on after its token."""
        return self._table[rules, tokens]

    def reason(self, kind: int, stop: tuple[str, ...], completion: Sequence[int]) -> StopReason | None:
        """Decides a candidate by its text."""
        if kind == _EOS:
            return StopReason.EOS
        if kind == _MAYBE:
            text = self.text(completion)
            return StopReason.TAG if any(string in text for string in stop) else None
        return None

    def text(self, completion: Sequence[int]) -> str:
        """The completion, special tokens kept."""
        return self._tokenizer.decode(
            completion, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _row(self, stop: tuple[str, ...]) -> torch.Tensor:
        """A stop string ends in a token that holds its last character, or in a piece of a character."""
        if self._pieces is None:
            self._pieces = [self.text([token]) for token in range(len(self._tokenizer))]
        last = {string[-1] for string in stop if string}
        row = self._table[0].clone()
        for token, piece in enumerate(self._pieces[: len(row)]):
            if row[token] == _GOES_ON and (_BROKEN in piece or not last.isdisjoint(piece)):
                row[token] = _MAYBE
        return row
