"""A learner and a broadcast without processes. The learner's state is one number per step, so that it shows
which batches it has seen and in which order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from treadle.platform.records import Json, PublishReport, Share, StepBatch, StepReport, WeightVersion
from treadle.platform.seeds import derive_seed


@dataclass
class PlainLearner:
    """Chains a digest over what it was asked to learn; `refused` names steps that a guard skips."""

    state: int = 0
    seen: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    refused: frozenset[int] = frozenset()

    async def step(self, batch: StepBatch) -> StepReport:
        skipped = "nan" if batch.step in self.refused else ""
        members = [
            (m.group_id, [(c.sample_index, c.advantage, c.weight) for c in m.credits])
            if isinstance(m, Share)
            else m.token_ids.tolist()
            for row in batch.rows
            for m in row
        ]
        if not skipped:
            self.state = derive_seed(self.state, batch.step, json.dumps(members))
            self.seen.append((batch.step, batch.group_ids))
        return StepReport(
            step=batch.step,
            version=WeightVersion(step=batch.step + 1),
            metrics={"policy/loss": 0.5},
            tokens=len(members),
            wall_s=0.0,
            skipped=skipped,
        )

    async def save(self, folder: str, extra: Mapping[str, Json]) -> None:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / "state.json").write_text(json.dumps({"state": self.state, "extra": dict(extra)}))

    async def load(self, folder: str) -> None:
        self.state = int(json.loads((Path(folder) / "state.json").read_text())["state"])

    async def export_hf(self, folder: str) -> None:
        await self.save(folder, {})

    async def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> Mapping[str, NDArray[np.float32]]:
        return {"learner": np.zeros(sum(len(s) - 1 for s in sequences), dtype=np.float32)}


@dataclass
class PlainBroadcast:
    """Makes versions current, in `rollouts` too if it has some."""

    version: WeightVersion = field(default_factory=lambda: WeightVersion(step=0))
    rollouts: object = None

    async def publish(self, step: int) -> PublishReport:
        self.version = WeightVersion(step=step, digest=f"{step:032x}")
        if self.rollouts is not None:
            self.rollouts.version = self.version  # type: ignore[attr-defined]
        return PublishReport(
            version=self.version, adopted=("w0",), behind=(), sent_bytes=8, wall_s=0.0, metrics={}
        )
