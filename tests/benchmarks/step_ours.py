"""One process of Treadle's side: every role real, its steps timed from the outside.

python -m tests.benchmarks.step_ours --load demo --folder F --out FILE [--warm 3] [--steps 10] [key=value …]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tests.benchmarks.bench_rows import Stopwatch
from tests.benchmarks.step_loads import LOADS, grpo_stage, step_recipe

from treadle.platform import metric_names as names
from treadle.platform.records import Drawn, Issue, WeightVersion
from treadle.workflows.api import Recipe, grpo, open_run
from treadle.workflows.roles import RolloutRole


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRun:
    """What a process has measured. `step_s` and `metrics` are per measured step; `generating_s` and `learning_s`
    are the seconds of a measured step in which groups were being drawn, and in which the learner stepped or its
    weights were published."""

    setup: str
    step_s: list[float]
    lengths: list[int]
    reward_mean: float
    zero_spread: float
    generating_s: list[float] = field(default_factory=list)
    learning_s: list[float] = field(default_factory=list)
    staleness_max: float = 0.0
    phases_s: dict[str, float] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> StepRun:
        return cls(**json.loads(path.read_text()))


class WatchedRollouts:
    """The run's rollouts; notes lengths, and for how long at least one group was being drawn."""

    def __init__(self, rollouts: RolloutRole) -> None:
        self._rollouts = rollouts
        self._drawing = 0
        self._clock = Stopwatch()
        self._busy_s = 0.0
        self.lengths: list[int] = []

    async def draw(self, issue: Issue) -> Drawn:
        self._turn(+1)
        try:
            drawn = await self._rollouts.draw(issue)
        finally:
            self._turn(-1)
        self.lengths += drawn.lengths
        return drawn

    async def load(self, model_folder: str, version: WeightVersion = WeightVersion(step=0)) -> None:
        await self._rollouts.load(model_folder, version)

    async def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> Mapping[str, NDArray[np.float32]]:
        return await self._rollouts.logprobs(sequences)

    def take_busy_s(self) -> float:
        """Busy seconds since the last call."""
        self._turn(0)
        busy_s, self._busy_s = self._busy_s, 0.0
        return busy_s

    def _turn(self, change: int) -> None:
        lap_s = self._clock.lap()
        if self._drawing:
            self._busy_s += lap_s
        self._drawing += change


async def measured(recipe: Recipe, path: Path, warm_steps: int) -> StepRun:
    """Runs the recipe's GRPO stage; the time of a step is that between two reports of the loop."""
    config = grpo_stage(recipe)
    step_s, generating_s, metrics = [], [], []
    async with open_run(recipe, path, quiet=True) as run, run.begin("grpo") as journal:
        rollouts = WatchedRollouts(run.roles.rollouts)
        train = run.inputs["grpo"].train
        assert train is not None
        clock = Stopwatch()
        async for report in grpo(replace(run.roles, rollouts=rollouts), config, train, journal):
            step_s.append(clock.lap())
            generating_s.append(rollouts.take_busy_s())
            metrics.append(report.metrics)
    kept = metrics[warm_steps:]

    def mean(name: str) -> float:
        return statistics.fmean(figures[name] for figures in kept)

    phases = (names.TIMING_WAIT, names.TIMING_LEARN, names.TIMING_PUBLISH)
    return StepRun(
        setup=_setup(recipe),
        step_s=step_s[warm_steps:],
        lengths=rollouts.lengths,
        reward_mean=mean(names.REWARD_MEAN),
        zero_spread=mean(names.GROUPS_ZERO_STD),
        generating_s=generating_s[warm_steps:],
        learning_s=[m[names.TIMING_LEARN] + m[names.TIMING_PUBLISH] for m in kept],
        staleness_max=max(figures[names.STALENESS_MAX] for figures in metrics),
        phases_s={name: mean(name) for name in phases},
    )


def _setup(recipe: Recipe) -> str:
    r, n = recipe.rollout, recipe.learner
    return (
        f"{r.workers} {r.engine} engines of {r.slots} slots, {n.ranks} {n.backend} ranks (ZeRO {n.zero}, {n.dtype}, "
        f"{n.packing}), {recipe.verify.processes} verifier processes, coordinator with digests and probe, ledger, "
        f"metrics spool, staleness {grpo_stage(recipe).staleness}, {r.threads} thread per process"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", choices=sorted(LOADS), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warm", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(sys.argv[1:])
    recipe = step_recipe(LOADS[given.load], given.folder, given.warm + given.steps, given.overrides)
    path = given.out.with_suffix(".run")
    shutil.rmtree(path, ignore_errors=True)
    asyncio.run(measured(recipe, path, given.warm)).write(given.out)


if __name__ == "__main__":
    main()
