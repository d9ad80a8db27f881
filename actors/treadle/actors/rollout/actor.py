"""The Ray shell of a rollout worker, and how the pool reaches it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayTaskError

from treadle.actors.calls import again, call, call_once, once
from treadle.actors.deaths import GONE, why
from treadle.actors.mail import Courier, Letter, Mailbox, Reply
from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.engine_loop import DrawnGroup
from treadle.actors.rollout.handles import Launch, WorkerDiedError
from treadle.actors.rollout.worker import RolloutWorker, WorkerStatus
from treadle.actors.stacks import where
from treadle.platform.errors import TreadleError
from treadle.platform.memory import kernel_kills, remedy, resident_bytes
from treadle.platform.packed import Packed
from treadle.platform.records import Drawn, Issue, Ref, Staged, WeightManifest, WeightVersion
from treadle.platform.rollcall import enlist
from treadle.platform.stacks import places, stacks

_SMALL_BYTES = 65_536
"""A group that cannot grow beyond this travels by value, together with others that are done at the same time; a
larger one stays in the object store, and only those who need it fetch it."""
_TOKEN_BYTES = 16
"""Of a sample: its id, mask, log-probability, and its part of the text."""
_LINGER_S = 0.02
"""A few decode steps of a small model: what is done by then is fetched in the same call."""

Asked: TypeAlias = tuple[Issue, int]
"""An issue and the least version step it may be drawn with."""
SmallGroup: TypeAlias = tuple[Drawn, Packed, tuple[str, ...]]


# Ray would repeat a call whose side effect happened, and restart without the weights: calls are repeated by who
# makes them (`once`), workers replaced by the pool.
@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"health": 1})
class RolloutActor:
    """See `RolloutWorker`. `where` and `stacks` answer while everything else hangs."""

    def __init__(self, name: str, config: RolloutConfig) -> None:
        enlist(name)
        self._worker = RolloutWorker(name, config)
        self._node = ray.get_runtime_context().get_node_id()
        self._mail = Mailbox("rollout/draw", self._drawn, _LINGER_S)

    @once
    async def load(self, model_folder: str, version: WeightVersion) -> WeightVersion:
        return await self._worker.load(model_folder, version)

    @ray.method(num_returns=3)
    async def draw(self, issue: Issue, min_version_step: int) -> DrawnGroup:
        return await self._worker.draw(issue, min_version_step)

    @once
    async def post(self, letters: Sequence[Letter[Asked]]) -> None:
        """Draws small groups; `fetch` gives them out."""
        self._mail.post(letters)

    @once
    async def fetch(self) -> list[Reply[SmallGroup]]:
        """See `Mailbox.fetch`."""
        return await self._mail.fetch()

    @once
    async def stage(self, manifest: WeightManifest, ticket: object) -> Staged:
        return await self._worker.stage(manifest, ticket)

    @once
    async def flip(self, version: WeightVersion) -> str:
        return await self._worker.flip(version)

    async def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        return await self._worker.logprobs(sequences)

    async def status(self) -> WorkerStatus:
        return dataclasses.replace(
            self._worker.status(),
            node=self._node,
            kernel_kills=kernel_kills(),
            resident_bytes=resident_bytes(),
        )

    @ray.method(concurrency_group="health")
    async def stacks(self) -> str:
        return stacks()

    @ray.method(concurrency_group="health")
    async def where(self) -> str:
        return places()

    async def _drawn(self, asked: Asked) -> SmallGroup:
        summary, group, texts = await self._worker.draw(*asked)
        return summary, Packed.of(group), texts


class RayWorker:
    """Implements `handles.WorkerHandle` over an actor handle, which stays reachable as `actor`."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._courier: Courier[Asked, SmallGroup] = Courier(self._post, self._fetch)

    async def load(self, model_folder: str, version: WeightVersion) -> WeightVersion:
        return await _answer(call_once(self.actor, "load", model_folder, version))

    async def draw(self, issue: Issue, min_version_step: int) -> tuple[Drawn, Ref, Ref]:
        if _most_bytes(issue) <= _SMALL_BYTES:
            return await self._courier.ask((issue, min_version_step))
        return await _answer(again("draw", lambda: self._by_reference(issue, min_version_step)))

    async def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        return await _answer(call(self.actor, "logprobs", list(sequences)))

    async def status(self) -> WorkerStatus:
        return await _answer(call(self.actor, "status"))

    async def where(self) -> str:
        return await where(self.actor)

    def kill(self) -> None:
        ray.kill(self.actor, no_restart=True)

    async def _by_reference(self, issue: Issue, min_version_step: int) -> tuple[Drawn, Ref, Ref]:
        summary, group, texts = self.actor.draw.remote(issue, min_version_step)
        return await summary, group, texts

    async def _post(self, letters: Sequence[Letter[Asked]]) -> None:
        await _answer(call_once(self.actor, "post", letters))

    async def _fetch(self) -> list[Reply[SmallGroup]]:
        replies: list[Reply[SmallGroup]] = await _answer(call_once(self.actor, "fetch"))
        return replies


def _most_bytes(issue: Issue) -> int:
    """What the issue's group may come to."""
    sampling = issue.sampling
    return sampling.group_size * (len(issue.prompt.token_ids) + sampling.max_new_tokens) * _TOKEN_BYTES


def ray_launch(config: RolloutConfig, options: Mapping[str, Any] | None = None) -> Launch:
    """Starts workers as Ray actors with the config's resources. `options` go to every actor and win: where it
    is placed (`scheduling_strategy`), its `runtime_env`."""
    resources: dict[str, Any] = {"num_cpus": config.cpus, "num_gpus": config.gpus}
    placed = options is not None and "scheduling_strategy" in options
    if config.accelerator and not placed:  # its place was chosen by the accelerator
        resources["accelerator_type"] = config.accelerator

    def launch(name: str, slots: int) -> RayWorker:
        chosen = resources | dict(options or {})
        # Draws wait for the engine while statuses must be answered: one event loop, many calls in flight.
        worker = dataclasses.replace(config, slots=slots)
        actor: Any = RolloutActor  # what ray.remote returns is untyped
        return RayWorker(actor.options(max_concurrency=10_000, **chosen).remote(name, worker))

    return launch


async def _answer(reference: Any) -> Any:
    """Awaits a call; the death of the actor becomes `WorkerDiedError`, an error raised in it stays itself."""
    try:
        return await reference
    except GONE as error:
        raise WorkerDiedError(cause := why(error), remedy("rollout", cause)) from error
    except RayTaskError as error:
        if isinstance(error.cause, TreadleError):
            raise error.cause from error
        raise
