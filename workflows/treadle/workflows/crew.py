"""Starts the roles and keeps them through the stages: processes are made once, models are switched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.actors.broadcast.actor import start_coordinator
from treadle.actors.broadcast.client import Broadcaster
from treadle.actors.broadcast.probe import Probe, probe_sequences
from treadle.actors.learner.config import LearnerConfig, OptimConfig
from treadle.actors.learner.fresh import ModelShape
from treadle.actors.learner.group import LearnerGroup
from treadle.actors.learner.stepping import LearnerSpec
from treadle.actors.preload import preload
from treadle.actors.replaced import Told, tell_nobody
from treadle.actors.rollout.actor import RayWorker, ray_launch
from treadle.actors.rollout.handles import WorkerHandle
from treadle.actors.rollout.membership import Resized
from treadle.actors.rollout.pool import RolloutPool
from treadle.actors.rollout.slots import Lowered
from treadle.actors.rollout.worker import WorkerStatus
from treadle.actors.stacks import stacks_of
from treadle.actors.verify.actor import ray_verifier_pool
from treadle.actors.verify.client import VerifierPool
from treadle.cluster.backoff import BackOff, Lever
from treadle.cluster.placement import Placement, reserve
from treadle.cluster.places import Places
from treadle.cluster.preemption import leaving
from treadle.platform.errors import BroadcastError
from treadle.platform.objectives.base import Objective
from treadle.platform.records import PublishReport, RoleSpec, WeightVersion
from treadle.workflows.elastic import PROCESSES, WORKERS
from treadle.workflows.models import ModelConfig
from treadle.workflows.recipe import Recipe
from treadle.workflows.roles import Roles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def engine_specs(recipe: Recipe) -> tuple[RoleSpec, ...]:
    """What drawing and judging need of the cluster."""
    return (recipe.rollout.role(), recipe.verify.role())


def role_specs(recipe: Recipe) -> tuple[RoleSpec, ...]:
    """What all roles of a recipe need of the cluster."""
    return (*engine_specs(recipe), LearnerGroup.role(recipe.learner))


def preloads(recipe: Recipe) -> tuple[str, ...]:
    """What the processes of all roles import."""
    return preload(recipe.rollout, recipe.learner)


def _rollouts(recipe: Recipe, places: Places, staleness: int = 0) -> RolloutPool:
    def launch(name: str, slots: int) -> WorkerHandle:
        return ray_launch(recipe.rollout, places.options(_number(name)))(name, slots)

    async def placed(name: str) -> bool:
        return await places.has(_number(name))

    pool = RolloutPool(recipe.rollout, launch, max_lag_steps=staleness, back_offs=recipe.recovery.back_offs())
    pool.placed = placed
    return pool


def _places(recipe: Recipe, placement: Placement, role: RoleSpec) -> Places:
    return Places(
        placement,
        role,
        embedded=not recipe.cluster.address,
        deadline_s=recipe.cluster.placement_deadline_s,
    )


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])


def _verifiers(recipe: Recipe, placement: Placement) -> VerifierPool:
    places = _places(recipe, placement, recipe.verify.role())
    pool = ray_verifier_pool(recipe.verify, places.options)
    pool.placed = places.has
    return pool


MICROBATCH = "learner.max_tokens_per_microbatch"


class _NoBroadcast:
    """Stands for the coordinator in stages without engines."""

    version = WeightVersion(step=0)

    async def publish(self, step: int) -> PublishReport:
        raise BroadcastError(f"broadcast.publish: no engines are set, so version {step} has nowhere to go.")


class Crew:
    """The learner starts at once; engines and verifiers when a stage needs them, or earlier in the background
    (`start_engines`), because a first pretraining step should not wait for them.

    `set_learner` and `set_engines` point the processes at a stage's model.
    """

    def __init__(self, recipe: Recipe, placement: Placement, staleness: int) -> None:
        self._recipe, self._placement = recipe, placement
        self._learner = LearnerGroup(
            recipe.learner,
            [placement.options("learner", i)["scheduling_strategy"] for i in range(recipe.learner.ranks)],
        )
        self._places = _places(recipe, placement, recipe.rollout.role())
        self._rollouts = _rollouts(recipe, self._places, staleness)
        self._verifiers = _verifiers(recipe, placement)
        self._broadcast: Broadcaster | None = None
        self._engines: asyncio.Task[None] | None = None
        self._told: Told = tell_nobody
        self._model = ""
        self._microbatch_tokens = recipe.learner.max_tokens_per_microbatch

    @property
    def roles(self) -> Roles:
        """The roles as contracts. Publishing is possible once `set_broadcast` was called."""
        return Roles(
            rollouts=self._rollouts,
            verifiers=self._verifiers,
            learner=self._learner,
            broadcast=self._broadcast or _NoBroadcast(),
            ranks=self._recipe.learner.ranks,
        )

    def tell(self, told: Told, missing: Callable[[str, str], None], lowered: Lowered) -> None:
        """From now on `told` hears of every process that a role has replaced by itself, `missing` (name, cause) of one
        whose successor the cluster has no place for, and `lowered` of one that gets less after it ran out of memory."""
        self._rollouts.slots.lowered = lowered
        self._told = self._rollouts.told = self._verifiers.told = told
        self._rollouts.missing = self._verifiers.missing = missing

    @property
    def engines_ready(self) -> bool:
        """Whether engines and verifiers have come up, and can be more or fewer."""
        engines = self._engines
        return engines is not None and engines.done() and not engines.cancelled() and not engines.exception()

    def sizes(self) -> dict[str, int]:
        """How many can work now, by the setting that says how many there should be."""
        return {WORKERS: self._rollouts.ready, PROCESSES: self._verifiers.processes}

    async def resize_workers(self, workers: int) -> Resized:
        """Rollout workers join, at the newest weights, or leave; see `Membership.resize`."""
        await self._places.reserve(workers)
        try:
            return await self._rollouts.resize(workers)
        finally:
            self._places.give_back([_number(name) for name in self._rollouts.workers])

    async def resize_verifiers(self, processes: int) -> None:
        """Each verify actor goes on with so many processes. Raises `ConfigError`."""
        await self._verifiers.resize(processes)

    def leaving(self) -> Mapping[str, float]:
        """The nodes of this run that are being drained, by id, with the seconds they have left. Not for an event
        loop."""
        mine = self._placement.nodes() | self._places.nodes()
        return {node: left_s for node, left_s in leaving().items() if node in mine}

    def avoid(self, nodes: Collection[str]) -> None:
        """New draws go to engines on other nodes."""
        self._rollouts.avoid(nodes)

    async def start_learner(self) -> None:
        """Raises `LearnerError` or `DeadlineError` if the ranks do not come up."""
        await self._learner.start()

    def start_engines(self, model: str) -> None:
        """Brings engines and verifiers up in the background; `set_engines` waits for them."""
        if self._engines is None:
            self._model = model
            self._engines = asyncio.create_task(self._start_engines(model), name="start engines")

    async def make_model(
        self, model: ModelConfig, tokenizer: PreTrainedTokenizerBase, target: Path, seed: int
    ) -> None:
        """Random weights in the model's shape, with the tokenizer's vocabulary."""
        target.parent.mkdir(parents=True, exist_ok=True)
        shape = ModelShape(
            architecture=model.architecture,
            layers=model.layers,
            hidden=model.hidden,
            heads=model.heads,
            kv_heads=model.kv_heads,
            intermediate=model.intermediate,
            context_tokens=model.context_tokens,
            tie_embeddings=model.tie_embeddings,
            initializer_range=model.initializer_range,
            vocabulary=len(tokenizer),
            eos_id=int(tokenizer.eos_token_id),
            bos_id=tokenizer.bos_token_id,
            pad_id=tokenizer.pad_token_id,
        )
        await self._learner.make_model(shape, str(target), seed)

    async def set_learner(self, model: str, optim: OptimConfig, objective: Objective) -> None:
        """Gives the ranks a stage's starting weights, optimizer and objective."""
        await self._learner.setup(
            LearnerSpec(
                model_folder=model,
                config=LearnerConfig(**asdict(self._recipe.learner), **asdict(optim)),
                objective=objective,
            )
        )

    async def set_engines(self, model: str) -> None:
        """Points the engines at a model folder, unless they hold it already."""
        self.start_engines(model)
        assert self._engines is not None
        await self._engines
        if self._model != model:
            await self._rollouts.load(model)
            self._model = model

    async def set_broadcast(self, model: str) -> None:
        """A coordinator for the stage, as the only publisher, with a probe that fits the model's vocabulary."""
        if self._broadcast is None:
            launch = self._launch_coordinator
            self._broadcast = Broadcaster(launch(), self._recipe.broadcast, launch=launch)
            self._broadcast.told = self._told
            self._rollouts.catch_up, self._rollouts.forget = self._catch_up, self._forget
        self._broadcast.probe = self._probe(model)
        await self._broadcast.register()

    async def broken(self) -> frozenset[str]:
        """Roles that only a replacement and a rollback bring back, found by asking them. Rollout workers, verifiers and
        the coordinator are replaced where they are used."""
        return frozenset({"learner"} if await self._learner.examine() else ())

    def lever(self, longest_tokens: int) -> Lever:
        """What may be lowered where the learner has run out of memory; `longest_tokens` are those of a sequence. A
        setting above all that a rank's step had is in force as that much: half of it is less for sure."""
        configured, now = self._microbatch_tokens, self._recipe.learner.max_tokens_per_microbatch
        return Lever(
            role="learner",
            name="the learner",
            setting=MICROBATCH,
            configured=configured,
            now=min(now, self._learner.row_tokens or now),
            least=min(configured, longest_tokens),
            why_least="it is down to one longest sequence",
        )

    def lower(self, back_off: BackOff) -> None:
        """For the learner from its next `set_learner` on."""
        learner = replace(self._recipe.learner, max_tokens_per_microbatch=back_off.after)
        self._recipe = replace(self._recipe, learner=learner)

    async def doing(self) -> dict[str, str]:
        """What every process of the roles is doing, in words. Takes a few seconds where one is frozen."""
        heard = self._rollouts.statuses
        said = {n: _in_words(heard[n]) if n in heard else "starting" for n in self._rollouts.workers}
        stats = self._verifiers.stats()
        said["verify"] = f"{stats.scored} scored, {stats.failed} failed, {stats.timed_out} timed out"
        coordinator = asyncio.create_task(self._broadcast.doing()) if self._broadcast is not None else None
        ranks = await self._learner.phases()
        if coordinator is not None:
            said["coordinator"] = await coordinator or "does not answer"
        return said | {f"learner-{rank}": phase or "does not answer" for rank, phase in enumerate(ranks)}

    async def stacks(self) -> dict[str, str]:
        """The stacks of learner ranks and rollout workers that answer; of none that is being started."""
        asked = {f"learner-{rank}": actor for rank, actor in self._learner.answering.items()}
        return await stacks_of(asked | _actors(self._rollouts.loaded))

    async def replace_broken(self) -> None:
        """New processes for the broken roles; `set_learner`, `set_engines` and `set_broadcast` give them their work.
        Raises `LearnerError` or `DeadlineError` if the ranks do not come up."""
        if self._broadcast is not None:
            self._broadcast.close()  # it knows the old ranks
            self._broadcast = None
        await self._learner.start()

    async def close(self) -> None:
        """Ends all role processes and gives their place back."""
        if self._engines is not None:
            self._engines.cancel()
            await asyncio.gather(self._engines, return_exceptions=True)
        self._rollouts.close()
        await self._verifiers.close()
        self._learner.close()
        self._places.give_back(())
        self._placement.release()

    def _launch_coordinator(self) -> Any:
        return start_coordinator(self._recipe.broadcast, self._learner.ranks, _actors(self._rollouts.loaded))

    async def _start_engines(self, model: str) -> None:
        await asyncio.gather(self._rollouts.start(model), self._verifiers.start())

    async def _catch_up(self, name: str, worker: WorkerHandle) -> None:
        if self._broadcast is None:
            return  # the stage is going back to its commit; its first publication reaches this engine, too
        await self._broadcast.catch_up(name, _actor(worker))

    async def _forget(self, name: str) -> None:
        if self._broadcast is not None:
            await self._broadcast.forget(name)

    def _probe(self, model: str) -> Probe:
        config = self._recipe.broadcast
        vocabulary = int(json.loads((Path(model) / "config.json").read_text())["vocab_size"])
        return Probe(
            rollouts=self._rollouts,
            learner=self._learner,
            sequences=probe_sequences(vocabulary, config.probe_sequences, config.probe_tokens),
            limit=config.probe_limit,
        )


async def open_crew(recipe: Recipe, staleness: int) -> Crew:
    """Reserves the roles' places and starts the learner. Raises `PlacementError` with a diagnosis."""
    placement = await _reserved(recipe, role_specs(recipe))
    crew = Crew(recipe, placement, staleness)
    try:
        await crew.start_learner()
    except BaseException:
        await crew.close()
        raise
    return crew


@asynccontextmanager
async def open_engines(recipe: Recipe, model: str) -> AsyncIterator[tuple[RolloutPool, VerifierPool]]:
    """Engines that hold a model folder, and verifiers: enough to evaluate."""
    placement = await _reserved(recipe, engine_specs(recipe))
    rollouts, verifiers = (
        _rollouts(recipe, _places(recipe, placement, recipe.rollout.role())),
        _verifiers(recipe, placement),
    )
    try:
        await asyncio.gather(rollouts.start(model), verifiers.start())
        yield rollouts, verifiers
    finally:
        rollouts.close()
        await verifiers.close()
        placement.release()


async def _reserved(recipe: Recipe, specs: Sequence[RoleSpec]) -> Placement:
    return await asyncio.to_thread(reserve, specs, recipe.cluster.placement_deadline_s)


def _in_words(status: WorkerStatus) -> str:
    failure = f", failed: {status.failure}" if status.failure else ""
    fetching = f", fetching weights for {status.fetching_s:.1f} s" if status.fetching_s > 1 else ""
    return (
        f"{status.phase}, {status.in_flight} in flight, version {status.version.step}{fetching}, "
        f"engine silent for {status.silent_s:.1f} s {status.where}".rstrip()
        + failure
    )


def _actors(workers: Mapping[str, WorkerHandle]) -> dict[str, Any]:
    return {name: _actor(worker) for name, worker in workers.items()}


def _actor(worker: WorkerHandle) -> Any:
    assert isinstance(worker, RayWorker)
    return worker.actor
