"""A started pool over workers of this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from tests.fakes import FakeEngine, LocalWorker, local_launch

from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.pool import RolloutPool
from treadle.cluster.backoff import BackOffs
from treadle.platform.records import Group, WeightVersion


class Bench:
    """A started pool over local workers with fake engines."""

    def __init__(self, step_s: float = 0.0, **changes: Any) -> None:
        plain = {"workers": 2, "slots": 16, "max_context_tokens": 64, "heartbeat_s": 0.05}
        self.config = RolloutConfig(
            **(plain | {"silence_deadline_s": 0.5, "draw_deadline_s": 10.0} | changes)
        )
        self.config.check()
        self.workers: list[LocalWorker] = []
        self.engines: list[FakeEngine] = []
        self.step_s = step_s
        self.fail_at_step = -1
        self.poison = ""
        self.most_slots = 0  # any number
        self.slots_matter = False
        self.slots: list[int] = []  # of each engine built
        self.back_offs = BackOffs(0)
        self.starting_s = 0.0

    def build(self, config: RolloutConfig, _: str, version: WeightVersion) -> FakeEngine:
        time.sleep(self.starting_s)
        self.engines.append(FakeEngine(config, version, self.step_s))
        self.engines[-1].fail_at_step = self.fail_at_step
        self.engines[-1].poison = self.poison
        self.engines[-1].most_slots = self.most_slots or config.slots
        self.engines[-1].slots_matter = self.slots_matter
        self.slots.append(config.slots)
        return self.engines[-1]

    def run(self, use: Callable[[RolloutPool], Awaitable[None]]) -> None:
        async def go() -> None:
            launch = local_launch(self.config, self.build, self.workers)
            pool = RolloutPool(self.config, launch, back_offs=self.back_offs)
            await pool.start("folder")
            try:
                await asyncio.wait_for(use(pool), 25)
            finally:
                pool.close()

        asyncio.run(go())

    async def until_drawing(self) -> None:
        while not any(engine.steps for engine in self.engines):
            await asyncio.sleep(0.002)


async def tokens_of(group: Awaitable[object]) -> list[list[int]]:
    record = await group
    assert isinstance(record, Group)
    return [sample.token_ids.tolist() for sample in record.samples]
