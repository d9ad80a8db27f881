"""Sequence-level distillation (Kim and Rush 2016, 1606.07947), as R1 did it: the teacher answers training prompts,
only verified answers are kept, and the student is fine-tuned on them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from treadle.platform.contracts import Prompts
from treadle.platform.errors import DataError
from treadle.platform.records import Group, Issue, Sampling, WeightVersion
from treadle.workflows.data.batches import TokenRow
from treadle.workflows.evaluate import correctness
from treadle.workflows.roles import Roles, opened


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedSet:
    """Verified answers as ragged arrays: answer i is `tokens[offsets[i]:offsets[i+1]]`, its first
    `prompt_tokens[i]` tokens are the prompt's. `asked` counts the samples drawn."""

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    asked: int

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def rows(self) -> list[TokenRow]:
        """Every answer as a sequence whose completion is the target."""
        rows = []
        for start, end, prompt in zip(self.offsets, self.offsets[1:], self.prompt_tokens, strict=False):
            rows.append(
                TokenRow(token_ids=self.tokens[start:end], loss_mask=np.arange(end - start) >= prompt)
            )
        return rows

    def save(self, path: Path) -> None:
        """Replaces the file atomically."""
        draft = path.with_name("draft-" + path.name)
        np.savez(
            draft,
            tokens=self.tokens,
            offsets=self.offsets,
            prompt_tokens=self.prompt_tokens,
            asked=self.asked,
        )
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> VerifiedSet:
        with np.load(path, allow_pickle=False) as stored:
            return cls(
                tokens=stored["tokens"],
                offsets=stored["offsets"],
                prompt_tokens=stored["prompt_tokens"],
                asked=int(stored["asked"]),
            )


async def verified_answers(
    roles: Roles,
    prompts: Prompts,
    *,
    count: int,
    sampling: Sampling,
    label: str,
    version: WeightVersion,
    keep_per_prompt: int,
) -> VerifiedSet:
    """Draws `sampling.group_size` answers to each of the first `count` prompts and keeps at most
    `keep_per_prompt` different correct ones of each. Raises `DataError` if none is correct."""

    async def one(index: int) -> list[tuple[NDArray[np.int32], int]]:
        issue = Issue(id=f"{label}/{index:08d}", prompt=prompts.at(index), sampling=sampling, version=version)
        drawn = await roles.rollouts.draw(issue)
        verdicts = await roles.verifiers.judge(drawn)
        if not any(correctness(verdicts)):
            return []
        group = await opened(drawn.group)
        assert isinstance(group, Group)
        return _distinct_correct(group, [correctness([v]) == [True] for v in verdicts], keep_per_prompt)

    kept = [pair for pairs in await asyncio.gather(*(one(i) for i in range(count))) for pair in pairs]
    if not kept:
        raise DataError(
            f"{label}: not one of {count} prompts was answered correctly by the teacher.",
            "Train the teacher further, or draw more samples per prompt.",
        )
    return VerifiedSet(
        tokens=np.concatenate([tokens for tokens, _ in kept]),
        offsets=np.cumsum([0, *(len(tokens) for tokens, _ in kept)], dtype=np.int64),
        prompt_tokens=np.array([length for _, length in kept], dtype=np.int64),
        asked=count * sampling.group_size,
    )


def _distinct_correct(
    group: Group, correct: Sequence[bool], keep: int
) -> list[tuple[NDArray[np.int32], int]]:
    found: dict[bytes, tuple[NDArray[np.int32], int]] = {}
    for sample, good in zip(group.samples, correct, strict=True):
        if good and len(found) < keep:
            found.setdefault(sample.token_ids.tobytes(), (sample.token_ids, len(group.prompt.token_ids)))
    return list(found.values())
