"""The learner as the driver sees it: one object over R rank actors. Implements `contracts.Learner` and
`Scorer`.

Every call goes to all ranks and has a deadline. The first failure ends the wait for the others: a collective
with a dead member would otherwise be waited for until its time-out. A group that failed is broken and says
so; `start` makes new ranks, `setup` and `load` bring them back to a checkpoint.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from treadle.actors.calls import call_once
from treadle.actors.learner.actor import LearnerRankActor
from treadle.actors.learner.config import GroupConfig
from treadle.actors.learner.failures import GRACE_S, RankFailure, dead, diagnose, refused_by_all
from treadle.actors.learner.figures import RankReport, merge
from treadle.actors.learner.fresh import ModelShape
from treadle.actors.learner.heartbeat import culprits, kernel_kills, listed, phases, silence, struck, unfit
from treadle.actors.learner.stepping import LearnerSpec
from treadle.platform.errors import DeadlineError, LearnerError, TreadleError
from treadle.platform.records import Json, RoleSpec, Share, StepBatch, StepReport, TrainSample

T = TypeVar("T")
_UNWATCHED = ("start", "make model")
"""Calls that begin with the start of a process, which answers nothing until it has imported everything."""


class LearnerGroup:
    """Ranks, optimizer and weights of one learner.

    Example: `group = LearnerGroup(config)`, `await group.start()`, then per stage
    `await group.setup(LearnerSpec(...))`, and `await group.step(batch)` until done; `group.close()` ends the
    processes. `scheduling` gives each rank a Ray scheduling strategy (its bundle of a placement group).
    """

    def __init__(self, config: GroupConfig, scheduling: Sequence[Any] | None = None) -> None:
        config.check()
        if scheduling is not None and len(scheduling) != config.ranks:
            raise LearnerError(f"learner: {len(scheduling)} places for {config.ranks} ranks.")
        self._config = config
        self._scheduling = scheduling
        self._actors: list[Any] = []
        self._broken = ""
        self._silent: Mapping[int, str] = {}
        self._kernel_kills: Sequence[tuple[str, int] | None] = ()
        self._spec: LearnerSpec | None = None
        self._row_tokens = 0

    @property
    def ranks(self) -> tuple[Any, ...]:
        """The rank actors' handles, rank 0 first; each has `publish(step, outgoing)`."""
        return tuple(self._actors)

    @property
    def answering(self) -> Mapping[int, Any]:
        """The rank actors' handles by rank, without those that have fallen silent."""
        return {rank: actor for rank, actor in enumerate(self._actors) if rank not in self._silent}

    @property
    def row_tokens(self) -> int:
        """Tokens of the whole sequences that the last step had for the rank with most of them; 0 before the first."""
        return self._row_tokens

    async def phases(self) -> list[str]:
        """What each rank says it is doing, rank 0 first; nothing where it does not answer within a few seconds."""
        return await phases(self._actors, self._silent)

    async def examine(self) -> str:
        """Why the group must be started again, or nothing. Asks the ranks, so no call may be under way."""
        if not self._broken and (reason := await unfit(self._actors)):
            self._broken = f"learner: {reason}"
        return self._broken

    async def start(self) -> None:
        """Starts the ranks (again, if they failed) and connects them.

        Raises LearnerError or DeadlineError within `start_deadline_s`.
        """
        self.close()
        self._broken, self._silent = "", {}
        deadline = time.monotonic() + self._config.start_deadline_s
        self._actors = [self._actor(rank) for rank in range(self._config.ranks)]
        host, port = (await self._ask("start", self._actors[:1], "open", deadline, self._left(deadline)))[0]
        await self._ask("start", self._actors, "join", deadline, host, port)
        self._kernel_kills = await kernel_kills(self._actors)

    def _actor(self, rank: int) -> Any:
        config = self._config
        options: dict[str, Any] = {
            "num_cpus": config.cpus,
            "num_gpus": config.gpus,
            "runtime_env": {"env_vars": _environment(config)},
        }
        if self._scheduling is not None:  # its place was chosen by the accelerator
            options["scheduling_strategy"] = self._scheduling[rank]
        elif config.accelerator:
            options["accelerator_type"] = config.accelerator
        actor: Any = LearnerRankActor
        return actor.options(**options).remote(rank, config.ranks, config.step_deadline_s)

    async def make_model(self, shape: ModelShape, target: str, seed: int) -> None:
        """Writes a model of random weights as a local Hugging Face folder without a tokenizer."""
        deadline = time.monotonic() + self._config.start_deadline_s
        await self._ask("make model", self._actors[:1], "make_model", deadline, shape, target, seed)

    async def setup(self, spec: LearnerSpec) -> int:
        """Gives the ranks a stage's model and objective; the processes stay. Returns the number of trained
        parameters."""
        spec.config.check()
        if spec.config.ranks != self._config.ranks:
            raise LearnerError(
                f"learner.setup: a stage for {spec.config.ranks} ranks on a group of {self._config.ranks}.",
                "Use the same learner.ranks in every stage.",
            )
        deadline = time.monotonic() + self._config.start_deadline_s
        counts = await self._ask("setup", self._actors, "setup", deadline, spec)
        self._spec = spec
        return int(counts[0])

    async def step(self, batch: StepBatch) -> StepReport:
        """Makes version step+1 on all ranks, or fails on all.

        Raises LearnerError or DeadlineError naming the rank, its phase, the step and the groups.
        """
        if len(batch.rows) != len(self._actors):
            raise LearnerError(
                f"learner.step {batch.step}: {len(batch.rows)} rows for {len(self._actors)} ranks.",
                "Deal the batch over learner.ranks rows.",
            )
        start = time.monotonic()
        self._row_tokens = max(sum(map(_tokens, row)) for row in batch.rows)
        what = f"step {batch.step}{_groups(batch)}"
        refs = [
            call_once(actor, "step", row, batch.step, batch.temperature)
            for actor, row in zip(self._actors, batch.rows, strict=True)
        ]
        reports: list[RankReport] = await self._all(what, self._actors, refs, self._step_deadline())
        return merge(batch.step, reports, time.monotonic() - start)

    async def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> Mapping[str, NDArray[np.float32]]:
        """`{"learner": values}`, see `contracts.Scorer`."""
        config: GroupConfig = self._config if self._spec is None else self._spec.config
        gathers = config.backend == "deepspeed" and config.zero == 3
        actors = self._actors if gathers else self._actors[:1]
        values = await self._ask("probe", actors, "logprobs", self._step_deadline(), list(sequences))
        return {"learner": values[0]}

    async def save(self, folder: str, extra: Mapping[str, Json]) -> None:
        await self._ask(f"save to {folder}", self._actors, "save", self._step_deadline(), folder, dict(extra))

    async def load(self, folder: str) -> None:
        await self._ask(f"load from {folder}", self._actors, "load", self._step_deadline(), folder)

    async def export_hf(self, folder: str) -> None:
        """Writes the policy as a local Hugging Face folder."""
        await self._ask(f"export to {folder}", self._actors, "export_hf", self._step_deadline(), folder)

    def close(self) -> None:
        """Ends the rank processes."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors = []

    @staticmethod
    def role(config: GroupConfig) -> RoleSpec:
        """What the group needs from the cluster."""
        return RoleSpec(
            role="learner",
            count=config.ranks,
            cpus=config.cpus,
            gpus=config.gpus,
            accelerator=config.accelerator,
        )

    def _step_deadline(self) -> float:
        return time.monotonic() + self._config.step_deadline_s

    @staticmethod
    def _left(deadline: float) -> float:
        return max(0.1, deadline - time.monotonic())

    async def _ask(self, what: str, actors: Sequence[Any], method: str, deadline: float, *args: Any) -> Any:
        if not actors and not self._broken:
            raise LearnerError(f"learner.{what}: the group has no ranks.", "Call start first.")
        refs = [call_once(actor, method, *args) for actor in actors]
        return await self._all(what, actors, refs, deadline)

    async def _all(
        self, what: str, actors: Sequence[Any], refs: Sequence[Awaitable[T]], deadline: float
    ) -> list[T]:
        """All ranks' answers. waits for: every rank, until `deadline`; unblocked by: the first failure."""
        if self._broken:
            raise LearnerError(f"learner.{what}: the group is broken: {self._broken}", "Start it again.")
        limit_s = self._left(deadline)
        tasks = [asyncio.ensure_future(_answer(ref)) for ref in refs]
        ended = asyncio.ensure_future(asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION))
        silent = asyncio.ensure_future(self._silence(what, actors))
        try:
            await asyncio.wait(
                {ended, silent}, timeout=self._left(deadline), return_when=asyncio.FIRST_COMPLETED
            )
            if any(task.done() and task.exception() is not None for task in tasks):
                # The root cause may be a rank that died a moment later than its peers noticed.
                await asyncio.wait(tasks, timeout=GRACE_S)
                raise await self._failed(what, actors, [_failure(task) for task in tasks])
            if silent.done():
                self._silent = silent.result()
                self._broken = f"learner.{what}: {' '.join(self._silent.values())}"
                raise LearnerError(
                    f"{self._broken} All: {listed(await phases(actors, self._silent))}",
                    "Look at that rank's node and log; learner.silence_deadline_s allows longer silences.",
                )
            if not ended.done():
                said = await phases(actors)
                late = culprits([rank for rank, task in enumerate(tasks) if not task.done()], said)
                named = ", ".join(map(str, late))
                doing = "; ".join(said[rank] or "no answer" for rank in late)
                self._broken = f"learner.{what}: rank {named} is not done after {limit_s:.0f} s: {doing}."
                raise DeadlineError(
                    f"{self._broken} All: {listed(said)}",
                    f"Look at the ranks' logs, or raise learner.{_setting(what)}.",
                )
        finally:
            for task in (*tasks, ended, silent):
                task.cancel()
        return [task.result() for task in tasks]

    async def _failed(
        self, what: str, actors: Sequence[Any], failures: Sequence[RankFailure | None]
    ) -> TreadleError:
        """What to raise for a call that some ranks failed."""
        said, kills = await asyncio.gather(phases(actors), kernel_kills(actors))
        struck_there = struck(self._kernel_kills, kills, dead(failures))
        nodes = [known[0] if known else "" for known in self._kernel_kills]
        error = diagnose(what, failures, listed(said), struck_there, nodes)
        # Ranks that all refused the call are in step with each other; any other mixture is not.
        self._broken = "" if refused_by_all(failures) else error.message
        return error

    async def _silence(self, what: str, actors: Sequence[Any]) -> Mapping[int, str]:
        watched = () if what in _UNWATCHED else actors
        return await silence(watched, self._config.heartbeat_s, self._config.silence_deadline_s)


async def _answer(ref: Awaitable[T]) -> T:
    return await ref


def _failure(task: asyncio.Task[Any]) -> RankFailure | None:
    if not task.done() or task.cancelled():
        return None
    return task.exception()


def _setting(what: str) -> str:
    return "start_deadline_s" if what in ("start", "setup") else "step_deadline_s"


def _tokens(member: Share | TrainSample) -> int:
    return member.tokens if isinstance(member, Share) else len(member.token_ids)


def _groups(batch: StepBatch) -> str:
    ids = batch.group_ids
    if not ids:
        return ""
    shown = ", ".join(ids[:8])
    return f" (groups {shown}{f' and {len(ids) - 8} more' if len(ids) > 8 else ''})"


def _environment(config: GroupConfig) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(config.threads)}
    if config.gpus == 0:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
