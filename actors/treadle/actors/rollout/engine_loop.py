"""The one thread that drives an engine.

consumes: issues and calls put in by other threads; waits for: the next of them while the engine is idle;
unblocked by: a put, at the latest every `_NAP_S`; produces: futures resolved with drawn groups and answers.

Between two decode steps everything put in is served, so that weights are adopted in the middle of a draw but
never in the middle of a step.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from treadle.actors.rollout.engines import FixedShapes
from treadle.platform.contracts import Engine, EngineSample
from treadle.platform.errors import DataError, MismatchError, RolloutError
from treadle.platform.failpoints import failpoint
from treadle.platform.memory import PHRASE, ran_out, remedy
from treadle.platform.records import Drawn, Group, Issue, Sample, WeightVersion

T = TypeVar("T")
DrawnGroup = tuple[Drawn, Group, tuple[str, ...]]
"""The summary (its references still empty), the group, the completions."""
_GATHER_S, _GATHER_AT_MOST_S = 0.002, 0.03
"""How long an idle engine waits for one more issue, and for all of them: less than a decode step, and a few."""
_NAP_S = 0.5


class EngineFailedError(RolloutError):
    """The engine raised: it draws no more, the worker has to be replaced."""


class WorkerBehindError(RolloutError):
    """The worker's weights are older than the draw allows."""


@dataclass(slots=True, kw_only=True)
class _Pending:
    """An issue being drawn: its finished samples by index."""

    issue: Issue
    future: Future[DrawnGroup]
    start_s: float
    done: dict[int, tuple[Sample, str]] = field(default_factory=dict)


class EngineLoop:
    """Owns one engine at a time. All methods may be called from any thread and return at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.phase = "empty"
        self.version = WeightVersion(step=0)
        self.failure = ""
        self.progress = 0  # grows with every decode step and every served call
        self.drawn_tokens = 0
        self._beat_s = time.monotonic()
        self._engine: Engine | None = None
        self._pending: dict[str, _Pending] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)
        self._thread.start()

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    @property
    def silent_s(self) -> float:
        """Seconds since the thread last came round."""
        return time.monotonic() - self._beat_s

    @property
    def slots_matter(self) -> bool:
        """See `engines.FixedShapes`."""
        engine = self._engine
        return isinstance(engine, FixedShapes) and engine.slots_matter

    def load(self, build: Callable[[], Engine], version: WeightVersion) -> Future[WeightVersion]:
        """Replaces the engine; issues still being drawn fail."""

        def act() -> WeightVersion:
            self._fail_pending(RolloutError(f"rollout/load: worker {self.name} switched to another model."))
            self._engine = None  # frees the old weights before the new ones are read
            failpoint("rollout.before_load", self.name)
            self._engine, self.failure = build(), ""
            self.version = version
            return version

        return self._put("loading", act)

    def adopt(self, version: WeightVersion, adopt: Callable[[Engine], str]) -> Future[str]:
        """Calls `adopt` between two steps; the engine holds `version` when it returns its digest. An engine
        that raises anything but `MismatchError`, which changes nothing, may hold a mixture: it has failed."""

        def act() -> str:
            engine = self._ready()
            try:
                digest = adopt(engine)
            except MismatchError:
                raise
            except Exception as error:
                self._give_up(error, f"adopting version {version.step}")
                raise
            self.version = WeightVersion(step=version.step, digest=digest)
            return digest

        return self._put("adopting", act)

    def ask(self, question: Callable[[Engine], T]) -> Future[T]:
        """Calls `question` between two steps."""

        def act() -> T:
            failpoint("rollout.before_probe", self.name)
            return question(self._ready())

        return self._put("scoring", act)

    def draw(self, issue: Issue, min_version_step: int) -> Future[DrawnGroup]:
        """The group of an issue. An issue that is being drawn already is joined, not drawn twice."""
        future: Future[DrawnGroup] = _promise()
        self._inbox.put(self._admission(issue, min_version_step, future))
        return future

    def _admission(
        self, issue: Issue, min_version_step: int, future: Future[DrawnGroup]
    ) -> Callable[[], None]:
        def act() -> None:
            try:
                self._admit(issue, min_version_step, future)
            except (RolloutError, DataError) as error:
                future.set_exception(error)

        return act

    def close(self) -> None:
        """Ends the thread after its current step."""
        self._closing.set()
        self._inbox.put(lambda: None)

    def _admit(self, issue: Issue, min_version_step: int, future: Future[DrawnGroup]) -> None:
        engine = self._ready()
        if self.version.step < min_version_step:
            raise WorkerBehindError(
                f"rollout/draw: worker {self.name} holds version {self.version.step}, {issue.id} needs "
                f"{min_version_step}.",
                "Publish to this worker again.",
            )
        running = self._pending.get(issue.id)
        if running is not None and running.issue.version != issue.version:
            # Left over from before the run went back to a commit: nobody waits for it, but the engine has the id.
            again = self._admission(issue, min_version_step, future)
            running.future.add_done_callback(lambda _: self._inbox.put(again))
            return
        if running is not None:
            running.future.add_done_callback(lambda done: _pass_on(done, future))
            return
        engine.admit(issue)
        self._pending[issue.id] = _Pending(issue=issue, future=future, start_s=time.monotonic())

    def _ready(self) -> Engine:
        if self.failure:
            raise EngineFailedError(
                f"rollout: the engine of worker {self.name} has failed: {self.failure}",
                remedy("rollout", self.failure),
            )
        if self._engine is None:
            raise RolloutError(f"rollout: worker {self.name} holds no model.", "Load a model folder first.")
        return self._engine

    def _put(self, phase: str, act: Callable[[], T]) -> Future[T]:
        future: Future[T] = _promise()

        def served() -> None:
            self.phase = phase
            try:
                future.set_result(act())
            except Exception as error:  # noqa: BLE001  the caller decides; the thread must go on
                future.set_exception(error)

        self._inbox.put(served)
        return future

    def _run(self) -> None:
        while not self._closing.is_set():
            busy = self._engine is not None and not self.failure and not self._engine.idle
            self._serve(0.0 if busy else _NAP_S)
            if self._engine is not None and not self.failure and not self._engine.idle:
                self.phase = "drawing"
                self._advance(self._engine)
            elif not self._pending:
                self.phase = "idle" if self._engine is not None else "empty"
            self._beat_s = time.monotonic()
        self._fail_pending(RolloutError(f"rollout/draw: worker {self.name} is closing."))

    def _serve(self, wait_s: float) -> None:
        """Does what is in the inbox. An idle engine waits for more until nothing has come for a moment: the groups
        of a step arrive one by one, and those that begin together share their prefill and their decode steps."""
        try:
            act = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            gathered_s = time.monotonic() + (_GATHER_AT_MOST_S if wait_s else 0.0)
            while True:
                act()
                self.progress += 1
                self._beat_s = time.monotonic()
                gathering = self._beat_s < gathered_s
                act = self._inbox.get(timeout=_GATHER_S) if gathering else self._inbox.get_nowait()
        except queue.Empty:
            return

    def _advance(self, engine: Engine) -> None:
        try:
            failpoint("rollout.mid_generation", self.name)
            for finished in engine.step():
                self._collect(finished)
            self.progress += 1
        except Exception as error:  # noqa: BLE001  an engine may raise anything; its issues get a typed error
            self._give_up(error, f"drawing {', '.join(list(self._pending)[:5])}")

    def _give_up(self, error: Exception, doing: str) -> None:
        """The engine is of no more use until another model is loaded."""
        self.failure = _one_line(error)
        traceback.print_exc()
        self._fail_pending(
            EngineFailedError(
                f"rollout/draw: the engine of worker {self.name} failed at version {self.version.step} while "
                f"{doing}: {self.failure}",
                remedy("rollout", self.failure, "See the worker's log for the traceback."),
            )
        )

    def _collect(self, finished: EngineSample) -> None:
        pending = self._pending[finished.issue_id]
        pending.done[finished.sample.index] = (finished.sample, finished.text)
        self.drawn_tokens += finished.sample.drawn_tokens
        if len(pending.done) == pending.issue.sampling.group_size:
            failpoint("rollout.before_return")
            del self._pending[finished.issue_id]
            pending.future.set_result(self._completed(pending))

    def _completed(self, pending: _Pending) -> DrawnGroup:
        ordered = [pending.done[index] for index in range(pending.issue.sampling.group_size)]
        samples = tuple(sample for sample, _ in ordered)
        summary = Drawn(
            id=pending.issue.id,
            prompt=pending.issue.prompt,
            group=None,
            texts=None,
            lengths=tuple(sample.drawn_tokens for sample in samples),
            stops=tuple(sample.stop for sample in samples),
            oldest=min(sample.oldest for sample in samples),
            newest=max(sample.newest for sample in samples),
            worker=self.name,
            wall_s=time.monotonic() - pending.start_s,
        )
        group = Group(id=pending.issue.id, prompt=pending.issue.prompt, samples=samples)
        return summary, group, tuple(text for _, text in ordered)

    def _fail_pending(self, error: RolloutError) -> None:
        pending, self._pending = self._pending, {}
        for entry in pending.values():
            entry.future.set_exception(error)


def _promise() -> Future[Any]:
    """A future its waiter cannot cancel: one that stops waiting must not break the thread that answers."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def _pass_on(done: Future[DrawnGroup], future: Future[DrawnGroup]) -> None:
    error = done.exception()
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(done.result())


def _one_line(error: BaseException) -> str:
    line = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    return f"it {PHRASE}, {line}" if ran_out(error) else line
