"""From scored groups and their credit to a step's batch, dealt over the learner's ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from treadle.platform.objectives.base import GroupCredit, ScoredGroup
from treadle.platform.records import Credit, Share, StepBatch
from treadle.platform.seeds import derive_seed
from treadle.workflows.data.batches import longest_first
from treadle.workflows.stream import Ready


def outcomes(groups: Sequence[Ready], *, step: int, shuffled: bool) -> list[ScoredGroup]:
    """What the objective sees. `shuffled` permutes the scored rewards over all samples of the step, the same way
    in every run: a control, in which the same rewards say nothing about the samples that get them."""
    seen = [group.outcome for group in groups]
    if not shuffled:
        return seen
    rewards = np.concatenate([outcome.rewards for outcome in seen])
    scored = np.flatnonzero(~np.isnan(rewards))
    rng = np.random.Generator(np.random.Philox(key=derive_seed("shuffled rewards", step)))
    order = np.arange(len(rewards))
    order[scored] = rng.permutation(scored)
    ends = np.cumsum([len(outcome.rewards) for outcome in seen])[:-1]
    shuffled_groups = [
        replace(o, rewards=r) for o, r in zip(seen, np.split(rewards[order], ends), strict=True)
    ]
    if any(group.parts is None for group in seen):
        return shuffled_groups
    parts = np.concatenate([group.parts for group in seen if group.parts is not None])[order]
    return [replace(o, parts=p) for o, p in zip(shuffled_groups, np.split(parts, ends), strict=True)]


def deal_groups(
    step: int,
    groups: Sequence[Ready],
    credits: Sequence[GroupCredit],
    *,
    ranks: int,
    temperature: float,
    keep_zero_advantage: bool,
) -> StepBatch:
    """Deals samples to ranks balanced by tokens; the shares of a group keep their order on every rank.

    Samples of weight 0 are left out, and those of advantage 0 unless `keep_zero_advantage` (a KL term): they have
    no gradient. Their tokens stay in the denominators, which the objective fixed before."""
    samples = [
        (len(ready.drawn.prompt.token_ids) + ready.drawn.lengths[i], g, i)
        for g, ready in enumerate(groups)
        for i in range(len(ready.drawn.lengths))
        if credits[g].weights[i] != 0 and (keep_zero_advantage or credits[g].advantages[i] != 0)
    ]
    dealt: list[dict[int, list[tuple[int, int]]]] = []
    for members in longest_first([tokens for tokens, _, _ in samples], ranks):
        row: dict[int, list[tuple[int, int]]] = {}
        for tokens, g, i in (samples[m] for m in members):
            row.setdefault(g, []).append((i, tokens))
        dealt.append(row)
    return StepBatch(
        step=step,
        rows=tuple(tuple(_share(groups[g], credits[g], row[g]) for g in row) for row in dealt),
        temperature=temperature,
    )


def _share(ready: Ready, credit: GroupCredit, members: Sequence[tuple[int, int]]) -> Share:
    return Share(
        group_id=ready.drawn.id,
        group=ready.drawn.group,
        credits=tuple(
            Credit(sample_index=i, advantage=float(credit.advantages[i]), weight=float(credit.weights[i]))
            for i, _ in members
        ),
        tokens=sum(tokens for _, tokens in members),
    )
