"""The roles a workflow talks to, as contracts: no Ray in sight."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from treadle.platform.contracts import Broadcast, Learner, Rollouts, Scorer, Verifiers
from treadle.platform.packed import unpacked
from treadle.platform.records import Ref, WeightVersion


class RolloutRole(Rollouts, Scorer, Protocol):
    """Rollouts that can be pointed at another model between stages."""

    async def load(self, model_folder: str, version: WeightVersion = ...) -> None: ...


class LearnerRole(Learner, Scorer, Protocol):
    """A learner that can leave its weights as a Hugging Face folder."""

    async def export_hf(self, folder: str) -> None: ...


class BroadcastRole(Broadcast, Protocol):
    """Publications that remember the newest version."""

    @property
    def version(self) -> WeightVersion: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Everything a workflow needs. `ranks` is the learner's data-parallel size."""

    rollouts: RolloutRole
    verifiers: Verifiers
    learner: LearnerRole
    broadcast: BroadcastRole
    ranks: int


async def opened(ref: Ref) -> object:
    """The record behind a reference. For the few places where the driver itself looks at samples (tables of
    chains, distillation sets); the training path never does."""
    return await ref if inspect.isawaitable(ref) else unpacked(ref)


async def texts_of(ref: Ref) -> Sequence[str]:
    """The completions behind `Drawn.texts`."""
    texts = await opened(ref)
    assert isinstance(texts, Sequence)
    return texts
