"""A run in progress: its folder, its roles, and the stages it has finished."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from treadle.actors.replaced import Replaced
from treadle.cluster.backoff import BackOff
from treadle.platform.checkpoints import Skipped
from treadle.platform.config import fingerprint
from treadle.platform.errors import ConfigError, FencedError, Interrupted
from treadle.platform.ledger import Ledger
from treadle.platform.objectives.base import Objective
from treadle.platform.storage import local_path
from treadle.platform.tracking import RunTracker
from treadle.workflows.configs import GrpoConfig, StageConfig, TrainedConfig
from treadle.workflows.crew import Crew
from treadle.workflows.elastic import WORKERS
from treadle.workflows.evaluate import EvalReport
from treadle.workflows.export import folder_digest
from treadle.workflows.folder import RunFolder
from treadle.workflows.inputs import StageInputs, stage_seed
from treadle.workflows.journal import Journal
from treadle.workflows.mirroring import RunMirror
from treadle.workflows.models import check_model_folder, copy_tokenizer
from treadle.workflows.outputs import StageOutput, stage_key
from treadle.workflows.recipe import Recipe
from treadle.workflows.roles import Roles
from treadle.workflows.saving import CheckpointKeeper

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


REPLACED = "replaced"
OOM_BACKOFF = "oom_backoff"
LEAVING = "leaving"
SHRUNK = "shrunk"
LAST_S = 30.0


class Run:
    """What a stage needs of its surroundings. Opened by `launch.open_run`."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        crew: Crew,
        ledger: Ledger,
        tracker: RunTracker,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Mapping[str, StageInputs],
        started: float,
        mirror: RunMirror | None = None,
    ) -> None:
        self.recipe, self.folder, self.crew = recipe, folder, crew
        self.ledger, self.tracker, self.tokenizer, self.inputs = ledger, tracker, tokenizer, inputs
        self.mirror = mirror
        self.outputs: dict[str, StageOutput] = {}
        self.first_step_s: float | None = None
        self.steps = 0
        self.recoveries = 0
        self.replacements: dict[str, int] = {}
        self.back_offs: list[BackOff] = []
        self._journals: dict[str, Journal] = {}
        self._left: frozenset[str] = frozenset()
        self._stopping = False
        self._started, self._stage_started = started, started
        self._model = ""

    @property
    def roles(self) -> Roles:
        return self.crew.roles

    def entered(self) -> None:
        """A stage begins: its wall time counts from here. Raises `Interrupted` where the run is to stop."""
        self._heed_stop()
        self._stage_started = time.monotonic()

    def _heed_stop(self) -> None:
        if self._stopping:
            done = ", ".join(self.outputs) or "none"
            raise Interrupted(f"Stopped on request between two steps; finished stages: {done}.")

    def stop(self) -> None:
        """The run ends after a commit that follows the step at hand, or where the next stage would begin."""
        self._stopping = True
        for journal in list(self._journals.values())[-1:]:
            journal.stop()

    def stepped(self) -> None:
        """Counts a step. After the first one of a run, what later stages need comes up in the background."""
        self.steps += 1
        if self.first_step_s is None:
            self.first_step_s = self.wall_s
            self.crew.start_engines(self._model)

    def replaced(self, what: Replaced) -> None:
        """A role has replaced one of its processes; nothing of the stage was lost."""
        self.replacements[what.role] = self.replacements.get(what.role, 0) + 1
        self.tracker.say(f"{what.name} was replaced within {what.seconds:.1f} s: {what.cause}")
        self.tracker.event(
            REPLACED,
            {"role": what.role, "name": what.name, "message": what.cause, "seconds": round(what.seconds, 3)},
        )

    def lowered(self, back_off: BackOff) -> None:
        """A role ran out of memory, and has less of what fills it from now on."""
        self.back_offs.append(back_off)
        message = f"Memory ran out: {back_off.sentence}."
        self.tracker.say(message)
        self.tracker.event(OOM_BACKOFF, {**asdict(back_off), "message": message})

    def missing(self, name: str, cause: str) -> None:
        """The cluster has no place for a worker's or a verifier's successor: the run goes on with fewer, until there is
        one."""
        left = self.crew.sizes()[WORKERS]
        self.tracker.say(f"{name} has no place in the cluster, and the run goes on without it: {cause}")
        self.tracker.event(SHRUNK, {"name": name, "message": cause, "workers": left})

    def leave(self, nodes: Mapping[str, float]) -> None:
        """Nodes of the run, by id, will be gone in so many seconds: no new draws there, and a commit after this step
        (after every step of their last `LAST_S`). Called again and again while they last; what is new is told."""
        self.crew.avoid(nodes)
        for node in nodes.keys() - self._left:
            left = "soon" if math.isinf(nodes[node]) else f"in {nodes[node]:.0f} s"
            self.tracker.say(
                f"Node {node[:8]} will be gone {left}: no new draws there, a commit after this step."
            )
            self.tracker.event(LEAVING, {"node": node, "left_s": min(nodes[node], 1e9)})
        if nodes.keys() - self._left or any(left_s < LAST_S for left_s in nodes.values()):
            for journal in list(self._journals.values())[-1:]:
                journal.hurry()
        self._left = frozenset(nodes)

    def doing(self) -> tuple[str, int, str, float]:
        """The newest stage, the step it is at, the phase of that step and for how many seconds."""
        if not self._journals:
            return "", 0, "starting", self.wall_s
        stage, journal = list(self._journals.items())[-1]
        phase, seconds = journal.clock.doing
        return stage, journal.step, phase, seconds

    def step_of(self, stage: str) -> int:
        """Steps that a stage has finished, its commits and those since; 0 before it has begun."""
        return self._journals[stage].step if stage in self._journals else 0

    async def model_folder(self, name: str, config: StageConfig) -> Path:
        """The Hugging Face folder a stage starts from."""
        model = config.model
        if model.stage:
            return Path(self.outputs[model.stage].model)
        if model.path:
            with local_path(model.path) as source:
                check_model_folder(source)
                return source
        target = self.folder.path / "work" / name / "init"
        if not target.exists():
            await self.crew.make_model(model, self.tokenizer, target, stage_seed(self.recipe, name))
            copy_tokenizer(self.folder.tokenizer, target)
        return target

    async def settle_mirror(self) -> None:
        """Waits for the last commit to arrive in the mirror, if there is one. Raises `FencedError` where it is another
        process's by now."""
        if self.mirror:
            await self.mirror.settle()
            self.mirror.check()

    def begin(self, name: str) -> AbstractAsyncContextManager[Journal]:
        """Opens a GRPO stage of the recipe by name, for a loop of one's own."""
        config = self.recipe.stages[name]
        if not isinstance(config, GrpoConfig):
            raise ConfigError(
                f"stages.{name} is of kind {config.kind}.", "begin() opens stages of kind grpo."
            )
        return self.stage(name, config, config.objective, steps=config.steps, engines=True)

    @asynccontextmanager
    async def stage(
        self, name: str, config: TrainedConfig, objective: Objective, *, steps: int, engines: bool
    ) -> AsyncIterator[Journal]:
        """Sets the learner (and the engines) to the stage's model, or to its newest committed checkpoint."""
        self._model = str(await self.model_folder(name, config))
        optim = replace(config.optim, total_steps=config.optim.total_steps or steps)
        await self.crew.set_learner(self._model, optim, objective)
        keeper = CheckpointKeeper(
            self.recipe.checkpoint,
            str(self.folder.checkpoints),
            self.ledger,
            self.roles.learner,
            mirror=self.mirror,
            passed_over=self._passed_over,
        )
        position = await keeper.restore(name)
        if engines:
            await self.crew.set_engines(self._model)
            await self.crew.set_broadcast(self._model)
            await self.roles.broadcast.publish(position.step)
        self._heed_stop()
        tracker = self.tracker.stage(name, total_steps=steps)
        journal = Journal(
            stage=name,
            seed=stage_seed(self.recipe, name),
            position=position,
            ledger=self.ledger,
            tracker=tracker,
            keeper=keeper,
            weights=self.recipe.verify.parts,
            most_refused=self.recipe.recovery.max_refused,
        )
        self._journals.pop(name, None)
        self._journals[name] = journal  # the newest is the last
        try:
            yield journal
        except FencedError:
            raise
        except BaseException:
            tracker.close("failed")
            raise
        tracker.close()

    def _passed_over(self, skipped: Skipped) -> None:
        self.tracker.event("checkpoint_passed_over", {"folder": skipped.url, "message": skipped.reason})
        self.tracker.say(f"warning: the checkpoint of step {skipped.step} is passed over: {skipped.reason}")

    async def finish(
        self,
        name: str,
        config: StageConfig,
        journal: Journal,
        *,
        evaluation: EvalReport | None,
        notes: Mapping[str, float] | None = None,
    ) -> StageOutput:
        """Writes the stage's artefact: the learner's weights as a Hugging Face folder."""
        self.ledger.check_held()
        target = self.folder.artifact(name)
        await self.roles.learner.export_hf(str(target))
        copy_tokenizer(self.folder.tokenizer, target)
        return self.output(
            name,
            config,
            model=str(target),
            digest=folder_digest(target),
            steps=journal.step,
            evaluation=evaluation,
            notes=notes,
        )

    def output(
        self,
        name: str,
        config: StageConfig,
        *,
        model: str,
        digest: str,
        steps: int,
        evaluation: EvalReport | None,
        notes: Mapping[str, float] | None = None,
    ) -> StageOutput:
        """The record of a finished stage."""
        return StageOutput(
            stage=name,
            kind=config.kind,
            key=self.key(name),
            model=model,
            digest=digest,
            steps=steps,
            wall_s=time.monotonic() - self._stage_started,
            evaluation=evaluation,
            notes=notes or {},
        )

    def key(self, name: str) -> str:
        """The content address of a stage: its settings, the stages it builds on, tokenizer and seed."""
        config = self.recipe.stages[name]
        needed = {config.model.stage, getattr(config, "teacher", "")} - {""}
        if isinstance(config, GrpoConfig):
            config = replace(config, take_deadline_s=0.0)  # how long one waits is no part of a result
        upstream = {n: self.outputs[n] for n in needed}
        prints = fingerprint(
            {"stage": config, "tokenizer": self.recipe.tokenizer, "verify": self.recipe.verify.parts}
        )
        return stage_key(prints, upstream, self.recipe.seed)

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._started
