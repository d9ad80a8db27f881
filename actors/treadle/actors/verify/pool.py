"""The processes of one actor and the queue before them; plain asyncio, no Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic

from treadle.actors.verify.asked import JudgeRequest
from treadle.actors.verify.cache import VerdictCache, sample_key, task_key
from treadle.actors.verify.composite import ScoringSpec
from treadle.actors.verify.config import VerifyConfig
from treadle.actors.verify.forking import ChildError, ForkServer
from treadle.actors.verify.frames import encode
from treadle.actors.verify.jobs import Job, JobQueue, Piece, merged
from treadle.actors.verify.runner import Batch, Limits, Runner
from treadle.actors.verify.scaling import Load, wanted_processes
from treadle.actors.verify.verdicts import VerdictCounter, VerifyStats, unscored
from treadle.platform.errors import VerifierError
from treadle.platform.failpoints import failpoint
from treadle.platform.records import Verdict, VerdictStatus

_LOG = logging.getLogger(__name__)
_TICK_S = 0.1
"""How often a queue that waits is looked at."""
_FIRST_GUESS_S = 0.01
"""Seconds of a completion before any was judged."""


class _Worker:
    """One process and the task that feeds it. Keeps `process.Overflow` for the batch at work."""

    def __init__(self, runner: Runner, pool: ProcessPool) -> None:
        self.runner = runner
        self.after_s = 0.0
        self.task: asyncio.Task[None] | None = None
        self.since_s: float | None = None  # when the batch at work began
        self.idle_since_s = monotonic()
        self.owners: list[tuple[Job, int]] = []
        self.stuck = False
        self._pool = pool

    def wanted(self) -> bool:
        if not self.stuck:
            self.stuck = True
            self._pool.grow()
        return self._pool.has_room()

    def take(self, positions: Sequence[int]) -> None:
        self._pool.move([self.owners[position] for position in positions])


class ProcessPool:
    """Judges groups on killable processes, `processes` of them, up to `max_processes` while the queue is old.

    consumes: requests, cut to pieces; waits for: a place in the queue (bounded: callers wait, nothing is dropped),
    then for a process; unblocked by: a process finishing or being killed at a deadline; produces: verdicts in sample
    order.
    """

    def __init__(self, config: VerifyConfig) -> None:
        self._config = config
        spec = ScoringSpec(
            parts=dict(config.parts),
            eos=config.eos,
            think_opened=config.think_opened,
            custom=dict(config.custom),
            options={name: dict(options) for name, options in config.options.items()},
        )
        self._limits = Limits(
            deadline_s=config.deadline_s,
            startup_deadline_s=config.startup_deadline_s,
            deadlines_s=config.deadlines_s(),
            pins=dict(config.pins),
        )
        self._forks = ForkServer(
            spec, config.memory_bytes, config.startup_deadline_s, config.pass_environment
        )
        self._queue = JobQueue(config.queue_batches, config.caps())
        self._cache = VerdictCache(config.cache_entries)
        self._counter = VerdictCounter()
        self._workers: list[_Worker] = []
        self._watch: asyncio.Task[None] | None = None
        self._deterministic: set[str] = set()
        self._retired = 0
        self._leavers = 0

    async def start(self) -> None:
        """Starts the processes and builds the warm verifiers. Raises `VerifierError` when they cannot be, or are not
        of the pinned versions."""
        failpoint("verify.before_start")
        runners = [self._runner() for _ in range(self._config.processes)]
        results = await asyncio.gather(*map(self._warm, runners), return_exceptions=True)
        broken = [result for result in results if isinstance(result, BaseException)]
        if broken:
            for runner in runners:
                await runner.drop()
            await self._forks.close()
            detail = broken[0].detail if isinstance(broken[0], ChildError) else repr(broken[0])
            raise VerifierError(
                f"verify, start: {detail.rstrip('.')}.",
                "See verify.options, verify.custom and verify.memory_bytes.",
            )
        for runner in runners:
            self._deterministic |= runner.deterministic
            self._employ(runner)
        self._watch = asyncio.create_task(self._watch_over())

    async def judge(self, request: JudgeRequest, texts: tuple[str, ...]) -> tuple[Verdict, ...]:
        """One verdict per completion. Raises `VerifierError` on a closed pool or unequal lengths."""
        failpoint("verify.before_judge")
        if not self._workers:
            raise VerifierError(f"verify, judge {request.group_id}: the pool is not running.")
        if len(texts) != len(request.finished):
            raise VerifierError(
                f"verify, judge {request.group_id}: {len(texts)} completions, {len(request.finished)} stops."
            )
        if unsendable := _unsendable(request):
            return (unscored(VerdictStatus.FAILED, 0.0, unsendable, request.verifier),) * len(texts)
        samples = tuple(zip(texts, request.finished, (0,) * len(texts), strict=True))
        job = Job(Batch(verifier=request.verifier, payloads=(request.payload,), samples=samples))
        for indices in self._pieces(self._unknown(job)):
            await self._queue.put(Piece(job, indices))
        verdicts = await job.done
        self._counter.add(verdicts)
        failpoint("verify.before_return")
        return verdicts

    def stats(self) -> VerifyStats:
        """Verdicts and seconds so far, and the state of the queue."""
        return replace(
            self._counter.stats(),
            processes=len(self._workers),
            restarts=self.restarts,
            waiting_samples=self._queue.samples,
            queue_age_s=self._queue.age_s,
            cache_hits=self._cache.hits,
        )

    @property
    def restarts(self) -> int:
        """Processes replaced so far."""
        return self._retired + sum(max(0, worker.runner.starts - 1) for worker in self._workers)

    async def close(self) -> None:
        """Ends all processes; whoever still waits gets `VerifierError`."""
        workers, self._workers = self._workers, []
        watch = [self._watch] if self._watch is not None else []
        tasks = [*watch, *(worker.task for worker in workers if worker.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Not in the workers: one that is cancelled before its first step runs no cleanup.
        for worker in workers:
            await worker.runner.drop()
        await self._forks.close()
        self._queue.close()

    def has_room(self) -> bool:
        """Whether another process is idle, or may be started."""
        idle = any(worker.since_s is None for worker in self._workers)
        return idle or len(self._workers) < self._config.most_processes

    def grow(self) -> None:
        """Starts the processes that are missing now."""
        config = self._config
        load = Load(
            waiting_samples=self._queue.samples,
            age_s=self._queue.age_s,
            stuck=sum(worker.stuck for worker in self._workers),
            busy=sum(worker.since_s is not None for worker in self._workers),
            service_s=self._counter.stats().p50_s or _FIRST_GUESS_S,
        )
        wanted = wanted_processes(load, config.processes, config.most_processes, config.queue_age_s)
        for _ in range(wanted - len(self._workers)):
            self._employ(self._runner())

    def resize(self, processes: int) -> None:
        """Goes on with so many processes: what is missing starts, and those too many end once they are idle."""
        self._leavers = max(0, len(self._workers) - processes)
        self._config = replace(self._config, processes=processes)
        self.grow()

    def move(self, owners: Sequence[tuple[Job, int]]) -> None:
        """Puts samples whose process is stuck in front of the queue."""
        by_job: dict[Job, list[int]] = {}
        for job, index in owners:
            by_job.setdefault(job, []).append(index)
        for job, indices in by_job.items():
            self._queue.put_back(Piece(job, tuple(indices)))

    def _unknown(self, job: Job) -> list[int]:
        """Samples that must be judged: not those with a cached verdict, and of equal ones the first."""
        batch = job.batch
        if batch.verifier not in self._deterministic or not self._config.cache_entries:
            return list(range(len(batch.samples)))
        task = task_key(batch.verifier, batch.payloads[0])
        first: dict[bytes, int] = {}
        for index, (text, finished, _) in enumerate(batch.samples):
            key = sample_key(task, text, finished)
            verdict = self._cache.get(key)
            if verdict is not None:
                job.give(index, replace(verdict, wall_s=0.0))
            elif first.setdefault(key, index) != index:
                job.twin(first[key], index)
        for key, index in first.items():
            job.keys[index] = key
        return sorted(first.values())

    def _pieces(self, indices: Sequence[int]) -> list[tuple[int, ...]]:
        size = self._config.batch_samples
        return [tuple(indices[begin : begin + size]) for begin in range(0, len(indices), size)]

    def _runner(self) -> Runner:
        return Runner(self._config.parts, self._limits, self._forks)

    async def _warm(self, runner: Runner) -> None:
        for name in self._config.warm:  # before the fork, so that the process comes with them
            await self._forks.load(name)
        await runner.ready()
        for name in self._config.warm:
            await runner.ready(name)

    def _employ(self, runner: Runner) -> None:
        worker = _Worker(runner, self)
        self._workers.append(worker)
        worker.task = asyncio.create_task(self._work(worker))

    async def _work(self, worker: _Worker) -> None:
        await self._prepare(worker.runner, *self._config.warm)
        while True:
            pieces = await self._queue.take(self._config.batch_samples, len(self._workers))
            worker.since_s = monotonic()
            try:
                wanted = [piece for piece in pieces if not piece.job.done.done()]  # else its caller went away
                if wanted:
                    await self._serve(worker, wanted)
            finally:
                self._queue.release(pieces[0].verifier)
                worker.since_s, worker.idle_since_s, worker.stuck = None, monotonic(), False

    async def _serve(self, worker: _Worker, pieces: list[Piece]) -> None:
        """A fault of ours must reach the callers and must not end the worker: the queue would stand still."""
        batch, worker.owners = merged(pieces)
        worker.after_s = self._config.shed_after * self._limits.deadline_of(batch.verifier)
        try:
            verdicts = await worker.runner.judge(batch, worker)
        except asyncio.CancelledError:
            _refuse(pieces, "the pool was closed")
            raise
        except Exception as error:  # noqa: BLE001  the process may be in any state: it goes, the callers are told
            _LOG.exception("verify: a batch could not be judged")
            await worker.runner.drop()
            _refuse(pieces, f"{type(error).__name__}: {error}")
            return
        self._deterministic |= worker.runner.deterministic
        for position, verdict in verdicts.items():
            job, index = worker.owners[position]
            if (key := job.keys.get(index)) is not None:
                self._cache.put(key, verdict)
            job.give(index, verdict)
        await self._prepare(worker.runner, batch.verifier)

    async def _prepare(self, runner: Runner, *verifiers: str) -> None:
        """Has a process ready before the next batch comes; one that cannot start is the next batch's verdict."""
        try:
            for name in verifiers or ("",):
                await runner.ready(name)
        except ChildError as error:
            _LOG.warning("verify: %s", error.detail)

    async def _watch_over(self) -> None:
        """Starts processes while the queue is old, and ends those that have had nothing to do for a while."""
        while True:
            await asyncio.sleep(_TICK_S)
            self.grow()
            extra = max(0, len(self._workers) - self._config.processes)
            self._leavers = min(self._leavers, extra)
            limit_s = 0.0 if self._leavers else self._config.idle_s
            spare = [w for w in self._workers if w.since_s is None and monotonic() - w.idle_since_s > limit_s]
            for worker in spare[: self._leavers or extra]:
                if worker.since_s is None:  # one that was dismissed before it may have taken a while
                    await self._dismiss(worker)

    async def _dismiss(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._retired += max(0, worker.runner.starts - 1)
        assert worker.task is not None
        worker.task.cancel()
        await asyncio.gather(worker.task, return_exceptions=True)
        await worker.runner.drop()


def _unsendable(request: JudgeRequest) -> str:
    """Why a payload cannot be written as JSON (an integer of 5,000 digits), or nothing. Asked before batches
    are merged, so that a bad prompt fails alone."""
    try:
        encode(dict(request.payload))
    except (TypeError, ValueError) as error:
        return f"the payload of prompt {request.prompt_id} cannot be sent to a verifier: {error}"
    return ""


def _refuse(pieces: Sequence[Piece], reason: str) -> None:
    for piece in pieces:
        piece.job.refuse(reason)
