"""A rollout worker: one engine, its thread, and the weights staged beside the ones in use."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.actors.broadcast.standby import Standby
from treadle.actors.broadcast.transports import fetch
from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.engine_loop import DrawnGroup, EngineLoop
from treadle.actors.rollout.engines import build_engine
from treadle.platform.contracts import Engine
from treadle.platform.errors import BroadcastError
from treadle.platform.failpoints import failpoint
from treadle.platform.records import Issue, Staged, WeightManifest, WeightVersion
from treadle.platform.stacks import places

Fetch = Callable[[WeightManifest, object, float], list[NDArray[np.uint8]]]
"""(manifest, ticket, deadline_s) -> the version's checked buckets, as `broadcast.transports.fetch`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """What a worker says of itself. `silent_s` is how long its engine thread has not come round, `failure`
    why its engine draws no more (empty while it does)."""

    name: str
    phase: str  # empty | loading | idle | drawing | adopting | scoring
    version: WeightVersion
    in_flight: int  # issues
    progress: int
    drawn_tokens: int
    silent_s: float
    failure: str
    node: str = ""  # Ray's id of it
    where: str = ""
    """In which functions the process is, once its engine is silent, or weights are being fetched, for a second."""
    fetching_s: float = 0.0
    """For how long it has been fetching weights."""
    kernel_kills: int = 0
    """See `memory.kernel_kills`: of its node."""
    resident_bytes: int = 0
    slots_matter: bool = False
    """Whether the samples of its engine depend on the number of its slots: see `engines.FixedShapes`."""


class RolloutWorker:
    """Draws groups, adopts weights in two phases. Its methods run on one event loop; the engine has its
    thread."""

    def __init__(
        self,
        name: str,
        config: RolloutConfig,
        build: Callable[[RolloutConfig, str, WeightVersion], Engine] = build_engine,
        fetch: Fetch = fetch,
    ) -> None:
        self._config = config
        self._build = build
        self._fetch = fetch
        self._loop = EngineLoop(name)
        self._standby = Standby()
        self._fetching_since_s: float | None = None  # monotonic
        self._staged: WeightVersion | None = None  # in the standby, and not adopted yet
        self._standby_lock = (
            asyncio.Lock()
        )  # a coordinator's last call may still run when another one takes over

    async def load(self, model_folder: str, version: WeightVersion) -> WeightVersion:
        """Switches to another model. Issues still being drawn fail with `RolloutError`."""
        async with self._standby_lock:
            self._staged = None
            self._standby.drop()
        build = self._loop.load(lambda: self._build(self._config, model_folder, version), version)
        return await asyncio.wrap_future(build)

    async def draw(self, issue: Issue, min_version_step: int) -> DrawnGroup:
        """The issue's group, drawn with weights of at least that step.

        Raises `DataError` for a prompt that cannot fit, `WorkerBehindError` when the weights are older,
        `EngineFailedError` when the engine failed; never returns fewer samples than asked for.
        """
        failpoint("rollout.before_draw", issue.prompt.id)
        return await asyncio.wrap_future(self._loop.draw(issue, min_version_step))

    async def stage(self, manifest: WeightManifest, ticket: object) -> Staged:
        """Fetches a version beside the one in use, whole or as a delta on what is there. Drawing goes on.

        Raises `StaleBaseError` for a delta that needs other weights than are there, otherwise `BroadcastError` or
        `DeadlineError`.
        """
        async with self._standby_lock:
            self._staged, self._fetching_since_s = None, time.monotonic()
            try:
                answer = await asyncio.to_thread(self._stage, manifest, ticket)
            finally:
                self._fetching_since_s = None
            self._staged = manifest.version
        return answer

    def _stage(self, manifest: WeightManifest, ticket: object) -> Staged:
        failpoint("rollout.before_stage")
        start = time.monotonic()
        buckets = self._fetch(manifest, ticket, self._config.stage_deadline_s)
        fetched = time.monotonic()
        digest = self._standby.put(manifest, buckets)
        return Staged(digest=digest, wire_s=fetched - start, apply_s=time.monotonic() - fetched)

    async def flip(self, version: WeightVersion) -> str:
        """Adopts what was staged, between two decode steps; returns the digest of what the engine then holds.

        Raises `BroadcastError` when this version is not staged, `MismatchError` when it does not fit the
        model.
        """
        failpoint("rollout.before_flip")
        async with self._standby_lock:
            if self._staged is None or self._staged.step != version.step:
                raise BroadcastError(
                    f"rollout/flip: version {version.step} is not staged.", "Stage it first."
                )
            standby = self._standby
            adopt = self._loop.adopt(version, lambda engine: engine.adopt(version, standby.tensors()))
            digest = await asyncio.wrap_future(adopt)
            self._staged = None
            standby.adopted()
        return digest

    async def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        """See `contracts.Scorer`: of every token but each sequence's first, concatenated."""
        return await asyncio.wrap_future(self._loop.ask(lambda engine: engine.logprobs(sequences)))

    def status(self) -> WorkerStatus:
        loop = self._loop
        fetching_s = time.monotonic() - self._fetching_since_s if self._fetching_since_s is not None else 0.0
        return WorkerStatus(
            name=loop.name,
            phase=loop.phase,
            version=loop.version,
            in_flight=loop.in_flight,
            progress=loop.progress,
            drawn_tokens=loop.drawn_tokens,
            silent_s=loop.silent_s,
            failure=loop.failure,
            where=places() if max(loop.silent_s, fetching_s) > 1 else "",
            fetching_s=fetching_s,
            slots_matter=loop.slots_matter,
        )

    def close(self) -> None:
        self._loop.close()
