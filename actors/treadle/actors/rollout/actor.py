"""The Ray shell of a rollout worker, and how the pool reaches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import ActorUnschedulableError, RayActorError, RayTaskError

from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.engine_loop import DrawnGroup
from treadle.actors.rollout.handles import Launch, WorkerDiedError
from treadle.actors.rollout.worker import RolloutWorker, WorkerStatus
from treadle.platform.errors import TreadleError
from treadle.platform.records import Drawn, Issue, Ref, WeightManifest, WeightVersion


# Ray would repeat a call whose side effect happened, and restart without the weights: the pool does both
# itself.
@ray.remote(max_restarts=0, max_task_retries=0)
class RolloutActor:
    """See `RolloutWorker`."""

    def __init__(self, name: str, config: RolloutConfig) -> None:
        self._worker = RolloutWorker(name, config)

    async def load(self, model_folder: str, version: WeightVersion) -> WeightVersion:
        return await self._worker.load(model_folder, version)

    @ray.method(num_returns=3)
    async def draw(self, issue: Issue, min_version_step: int) -> DrawnGroup:
        return await self._worker.draw(issue, min_version_step)

    async def stage(self, manifest: WeightManifest, ticket: object) -> str:
        return await self._worker.stage(manifest, ticket)

    async def flip(self, version: WeightVersion) -> str:
        return await self._worker.flip(version)

    async def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        return await self._worker.logprobs(sequences)

    async def status(self) -> WorkerStatus:
        return self._worker.status()


class RayWorker:
    """Implements `handles.WorkerHandle` over an actor handle, which stays reachable as `actor`."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    async def load(self, model_folder: str, version: WeightVersion) -> WeightVersion:
        return await _answer(self.actor.load.remote(model_folder, version))

    async def draw(self, issue: Issue, min_version_step: int) -> tuple[Drawn, Ref, Ref]:
        summary, group, texts = self.actor.draw.remote(issue, min_version_step)
        return await _answer(summary), group, texts

    async def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        return await _answer(self.actor.logprobs.remote(list(sequences)))

    async def status(self) -> WorkerStatus:
        return await _answer(self.actor.status.remote())

    def kill(self) -> None:
        ray.kill(self.actor, no_restart=True)


def ray_launch(config: RolloutConfig, options: Mapping[str, Any] | None = None) -> Launch:
    """Starts workers as Ray actors with the config's resources. `options` go to every actor and win: where it
    is placed (`scheduling_strategy`), its `runtime_env`."""
    resources: dict[str, Any] = {"num_cpus": config.cpus, "num_gpus": config.gpus}
    if config.accelerator:
        resources["accelerator_type"] = config.accelerator

    def launch(name: str) -> RayWorker:
        chosen = resources | dict(options or {})
        # Draws wait for the engine while statuses must be answered: one event loop, many calls in flight.
        actor: Any = RolloutActor  # what ray.remote returns is untyped
        return RayWorker(actor.options(max_concurrency=10_000, **chosen).remote(name, config))

    return launch


async def _answer(reference: Any) -> Any:
    """Awaits a call; the death of the actor becomes `WorkerDiedError`, an error raised in it stays itself."""
    try:
        return await reference
    except (RayActorError, ActorUnschedulableError) as error:
        raise WorkerDiedError(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}") from error
    except RayTaskError as error:
        if isinstance(error.cause, TreadleError):
            raise error.cause from error
        raise
