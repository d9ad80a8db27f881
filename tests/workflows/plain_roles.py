"""Roles without processes for workflow tests: a policy that is a table of probabilities, really sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from treadle.platform.errors import PoisonedError
from treadle.platform.records import (
    Drawn,
    Group,
    Issue,
    Prompt,
    Sample,
    StopReason,
    Verdict,
    VerdictStatus,
    WeightVersion,
)
from treadle.platform.seeds import derive_seed, uniforms


class NumberedPrompts:
    """Prompt i asks for digit i mod 10."""

    def __init__(self, n: int = 1000) -> None:
        self._n = n

    def at(self, index: int) -> Prompt:
        i = index % self._n
        return Prompt(
            id=f"p{i}",
            text=f"{i}?",
            token_ids=np.array([i % 10], np.int32),
            verifier="exact",
            payload={"answer": i % 10},
        )

    def __len__(self) -> int:
        return self._n


@dataclass
class CoinRollouts:
    """Draws one token per sample: the right digit with probability `skill(version step)`. Weights are whatever
    version was adopted last; `delay_s(index)` makes some groups slow."""

    skill: Callable[[int], float] = lambda step: 0.5
    delay_s: Callable[[str], float] = lambda group_id: 0.0
    version: WeightVersion = field(default_factory=lambda: WeightVersion(step=0))
    drawn: list[tuple[str, int]] = field(default_factory=list)
    poisoned: tuple[str, ...] = ()

    async def draw(self, issue: Issue) -> Drawn:
        version = self.version
        self.drawn.append((issue.id, version.step))
        if issue.id in self.poisoned:
            raise PoisonedError(f"{issue.prompt.id} ends workers")
        await asyncio.sleep(self.delay_s(issue.id))
        answer = int(issue.prompt.token_ids[0])
        samples = []
        for i in range(issue.sampling.group_size):
            u = uniforms(derive_seed(issue.sampling.seed, issue.prompt.id, i, issue.version.step), 1)[0]
            token = answer if u < self.skill(version.step) else (answer + 1) % 10
            samples.append(
                Sample(
                    index=i,
                    token_ids=np.array([answer, token], np.int32),
                    loss_mask=np.array([False, True]),
                    logprobs=np.array([0.0, -0.5], np.float32),
                    oldest=version,
                    newest=version,
                    stop=StopReason.EOS,
                )
            )
        return Drawn(
            id=issue.id,
            prompt=issue.prompt,
            group=Group(id=issue.id, prompt=issue.prompt, samples=tuple(samples)),
            texts=tuple(str(s.token_ids[1]) for s in samples),
            lengths=(1,) * len(samples),
            stops=(StopReason.EOS,) * len(samples),
            oldest=version,
            newest=version,
            worker="w0",
            wall_s=0.001,
        )


@dataclass
class DigitVerifiers:
    """Judges digits; `broken(group id)` says whether the verifier fails on a group."""

    broken: Callable[[str], bool] = lambda group_id: False

    async def judge(self, drawn: Drawn) -> tuple[Verdict, ...]:
        await asyncio.sleep(0)
        right = str(drawn.prompt.payload["answer"])
        if self.broken(drawn.id):
            return tuple(
                Verdict(
                    status=VerdictStatus.FAILED,
                    reward=float("nan"),
                    parts=(),
                    wall_s=0.0,
                    detail="broken",
                    verifier="digit/1",
                )
                for _ in drawn.lengths
            )
        rewards = [1.0 if text == right else 0.0 for text in drawn.texts]
        return tuple(
            Verdict(
                status=VerdictStatus.SCORED,
                reward=r,
                parts=(("accuracy", r),),
                wall_s=0.0,
                detail="",
                verifier="digit/1",
            )
            for r in rewards
        )


@dataclass
class ListBook:
    """Writes every transition into a list."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def issued(self, issue: Issue) -> None:
        self.lines.append(("issued", issue.id))

    def drawn(self, drawn: Drawn) -> None:
        self.lines.append(("drawn", drawn.id))

    def scored(self, drawn: Drawn, verdicts: Sequence[Verdict]) -> None:
        self.lines.append(("scored", drawn.id))

    def dropped(self, ids: Sequence[str], reason: str) -> None:
        self.lines.extend((f"dropped:{reason}", id_) for id_ in ids)

    def quarantined(self, issue: Issue, cause: str) -> None:
        self.lines.append((f"quarantined:{cause}", issue.id))

    def of(self, state: str) -> list[str]:
        return [id_ for kind, id_ in self.lines if kind == state]
