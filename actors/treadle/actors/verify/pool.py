"""The processes of one actor and the queue before them; plain asyncio, no Ray."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from treadle.actors.verify.asked import JudgeRequest
from treadle.actors.verify.composite import ScoringSpec
from treadle.actors.verify.config import VerifyConfig
from treadle.actors.verify.frames import encode
from treadle.actors.verify.process import ChildError
from treadle.actors.verify.runner import Batch, Limits, Runner, merged
from treadle.actors.verify.verdicts import VerdictCounter, VerifyStats, unscored
from treadle.platform.errors import VerifierError
from treadle.platform.failpoints import failpoint
from treadle.platform.records import Verdict, VerdictStatus

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Job:
    batch: Batch
    done: asyncio.Future[tuple[Verdict, ...]]


class ProcessPool:
    """Judges groups on `processes` killable processes.

    consumes: requests, cut to batches; waits for: a place in the queue (bounded: callers wait, nothing is
    dropped), then for a process; unblocked by: a process finishing or being killed at a deadline;
    produces: verdicts in sample order.
    """

    def __init__(self, config: VerifyConfig) -> None:
        self._config = config
        spec = ScoringSpec(
            parts=dict(config.parts),
            eos=config.eos,
            think_opened=config.think_opened,
            custom=dict(config.custom),
        )
        limits = Limits(
            deadline_s=config.deadline_s,
            startup_deadline_s=config.startup_deadline_s,
            memory_bytes=config.memory_bytes,
        )
        self._runners = [Runner(spec, limits) for _ in range(config.processes)]
        self._queue: asyncio.Queue[_Job] = asyncio.Queue(config.queue_batches)
        self._counter = VerdictCounter()
        self._workers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Starts all processes and builds the warm verifiers. Raises `VerifierError` when they cannot be."""
        warming = [asyncio.create_task(self._warm(runner)) for runner in self._runners]
        results = await asyncio.gather(*warming, return_exceptions=True)
        broken = [result for result in results if isinstance(result, BaseException)]
        if broken:
            for runner in self._runners:
                await runner.drop()
            detail = broken[0].detail if isinstance(broken[0], ChildError) else repr(broken[0])
            raise VerifierError(f"verify, start: {detail}.", "See verify.memory_bytes and verify.custom.")
        self._workers = [asyncio.create_task(self._work(runner)) for runner in self._runners]

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
        size = self._config.batch_samples
        pieces = [samples[begin : begin + size] for begin in range(0, len(samples), size)]
        found = await asyncio.gather(
            *(
                self._enqueue(Batch(verifier=request.verifier, payloads=(request.payload,), samples=piece))
                for piece in pieces
            )
        )
        verdicts = tuple(verdict for batch in found for verdict in batch)
        self._counter.add(verdicts)
        failpoint("verify.before_return")
        return verdicts

    def stats(self) -> VerifyStats:
        return self._counter.stats()

    @property
    def restarts(self) -> int:
        """Processes replaced so far."""
        return sum(max(0, runner.starts - 1) for runner in self._runners)

    async def close(self) -> None:
        """Ends all processes; whoever still waits gets `VerifierError`."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        for (
            runner
        ) in self._runners:  # not in the workers: one cancelled before its first step runs no cleanup
            await runner.drop()
        self._refuse_all()

    async def _enqueue(self, batch: Batch) -> tuple[Verdict, ...]:
        job = _Job(batch, asyncio.get_running_loop().create_future())
        await self._queue.put(job)
        if not self._workers:  # closed while this call waited for its place
            self._refuse_all()
        return await job.done

    def _refuse_all(self) -> None:
        """Each place that this frees wakes a caller that waits for one, who comes by here in turn."""
        while not self._queue.empty():
            _refuse(self._queue.get_nowait(), "the pool was closed")

    async def _warm(self, runner: Runner) -> None:
        await runner.ready()
        for name in self._config.warm:
            await runner.ready(name)

    async def _work(self, runner: Runner) -> None:
        held: _Job | None = None
        try:
            while True:
                first = held or await self._queue.get()
                jobs, held = self._company(first)
                wanted = [job for job in jobs if not job.done.done()]  # else its caller went away
                if wanted:
                    await self._serve(runner, wanted)
        finally:
            if held is not None:
                _refuse(held, "the pool was closed")

    def _company(self, first: _Job) -> tuple[list[_Job], _Job | None]:
        """What waits for the same verifier, as far as it fits into a batch and is not another process's
        share; and the first job that did not fit."""
        jobs = [first]
        room = self._config.batch_samples - len(first.batch.samples)
        for _ in range(self._queue.qsize() // len(self._runners)):
            job = self._queue.get_nowait()
            room -= len(job.batch.samples)
            if room < 0 or job.batch.verifier != first.batch.verifier:
                return jobs, job
            jobs.append(job)
        return jobs, None

    async def _serve(self, runner: Runner, jobs: list[_Job]) -> None:
        """A fault of ours must reach the callers and must not end the worker: the queue would stand still."""
        try:
            verdicts = await runner.judge(merged([job.batch for job in jobs]))
        except asyncio.CancelledError:
            for job in jobs:
                _refuse(job, "the pool was closed")
            raise
        except Exception as error:  # noqa: BLE001  the process may be in any state: it goes, the callers are told
            _LOG.exception("verify: a batch could not be judged")
            await runner.drop()
            for job in jobs:
                _refuse(job, f"{type(error).__name__}: {error}")
            return
        begin = 0
        for job in jobs:
            end = begin + len(job.batch.samples)
            if not job.done.done():
                job.done.set_result(verdicts[begin:end])
            begin = end
        await self._recover(runner, jobs[0].batch.verifier)

    async def _recover(self, runner: Runner, verifier: str) -> None:
        """Replaces a killed process before the next batch comes; one that cannot start is the next batch's
        verdict."""
        try:
            await runner.ready(verifier)
        except ChildError as error:
            _LOG.warning("verify: %s", error.detail)


def _unsendable(request: JudgeRequest) -> str:
    """Why a payload cannot be written as JSON (an integer of 5,000 digits), or nothing. Asked before batches
    are merged, so that a bad prompt fails alone."""
    try:
        encode(dict(request.payload))
    except (TypeError, ValueError) as error:
        return f"the payload of prompt {request.prompt_id} cannot be sent to a verifier: {error}"
    return ""


def _refuse(job: _Job, reason: str) -> None:
    if not job.done.done():
        job.done.set_exception(VerifierError(f"verify, judge: {reason}."))
