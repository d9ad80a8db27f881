"""Keeps one process alive and gets every sample of a batch a verdict, whatever the process does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from treadle.actors.verify.forking import ChildError, ForkServer
from treadle.actors.verify.process import Built, Child, Ending, Outcome, Overflow, Row
from treadle.actors.verify.verdicts import scored, unscored
from treadle.platform.records import Verdict, VerdictStatus

if TYPE_CHECKING:
    from treadle.platform.records import Json

FRUITLESS = 3
"""Processes in a row that may end without a verdict before the rest of a batch is given up as failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Completions for one verifier. Each has its text, whether it came to its end, and the index of its
    prompt's payload.

    Example: `Batch(verifier="exact", payloads=({"answer": "7"}, {"answer": "9"}), samples=(("7", True, 0),
    ("8", True, 0), ("9", True, 1)))`.
    """

    verifier: str
    payloads: tuple[Mapping[str, Json], ...]
    samples: tuple[tuple[str, bool, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long a process may take, and which versions of verifiers it must find. `deadlines_s` are those of single
    verifiers."""

    deadline_s: float
    startup_deadline_s: float
    deadlines_s: Mapping[str, float] = field(default_factory=dict)
    pins: Mapping[str, str] = field(default_factory=dict)

    def deadline_of(self, verifier: str) -> float:
        """Seconds for one completion."""
        return self.deadlines_s.get(verifier, self.deadline_s)

    def setting_of(self, verifier: str) -> str:
        """The setting that `deadline_of` comes from, with its value."""
        own = f"limits.{verifier}." if verifier in self.deadlines_s else ""
        return f"verify.{own}deadline_s={self.deadline_of(verifier)}"


class Runner:
    """Judges batches one after the other, in a process that it replaces when it must.

    A sample whose deadline passes is `timed_out`. One in whose course the process ends is judged once more, because
    the kernel or a person may have killed it; if that process ends too, the sample is to blame and `failed`. Samples
    behind either are judged as if nothing had been.
    """

    def __init__(self, weights: Mapping[str, float], limits: Limits, forks: ForkServer) -> None:
        self._weights = weights
        self._limits = limits
        self._forks = forks
        self._child: Child | None = None
        self.starts = 0
        self.deterministic: set[str] = set()  # verifiers whose verdicts may be used again

    async def judge(self, batch: Batch, overflow: Overflow | None = None) -> dict[int, Verdict]:
        """A verdict per sample, but for those that `overflow` took. Returns as soon as all are known, also with a
        dead process."""
        verdicts: dict[int, Verdict] = {}
        given = _Given(overflow) if overflow is not None else None
        fruitless = 0
        died: set[int] = set()
        while rest := _missing(batch, verdicts, given):
            try:
                found, detail = await self._attempt(batch, rest, given, died)
                fruitless = 0 if found else fruitless + 1
            except ChildError as error:
                found, detail = {}, error.detail
                fruitless = fruitless + 1 if error.fatal else FRUITLESS
            verdicts |= found
            if fruitless >= FRUITLESS:
                failure = unscored(VerdictStatus.FAILED, 0.0, f"{batch.verifier}: {detail}", batch.verifier)
                verdicts |= dict.fromkeys(_missing(batch, verdicts, given), failure)
        return verdicts

    async def ready(self, verifier: str = "") -> Built:
        """A living process that has built the verifier (if one is named). Raises `ChildError`."""
        if self._child is None:
            self.starts += 1
            await self._forks.load(verifier)
            self._child = await Child.start(self._forks, self._limits.startup_deadline_s)
        try:
            if not verifier:
                return Built()
            built = await self._child.prepare(verifier, self._limits.startup_deadline_s)
            self._check_version(verifier, built.version)
            if built.deterministic:
                self.deterministic.add(verifier)
            return built
        except ChildError as error:
            if error.fatal:
                await self.drop()
            raise

    async def drop(self) -> None:
        """Ends the process, if there is one, and frees what belongs to it."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            try:
                await child.reap()
            finally:
                child.close()

    def _check_version(self, verifier: str, version: str) -> None:
        pin = self._limits.pins.get(verifier)
        if pin is not None and re.match(rf"{re.escape(f'{verifier}/{pin}')}(?![\w.])", version) is None:
            detail = f"verify.pins.{verifier}={pin!r}, but this machine has {version!r}"
            raise ChildError(f"{detail}. Install the pinned one, or change the pin.", fatal=False)

    async def _attempt(
        self, batch: Batch, rest: list[int], given: _Given | None, died: set[int]
    ) -> tuple[dict[int, Verdict], str]:
        version = (await self.ready(batch.verifier)).version
        assert self._child is not None
        samples = [batch.samples[index] for index in rest]
        if given is not None:
            given.asked = rest
        try:
            outcome = await self._child.judge(
                batch.verifier, batch.payloads, samples, self._limits.deadline_of(batch.verifier), given
            )
        except BaseException:  # cancelled in mid-conversation: what the process says next would be misread
            await self.drop()
            raise
        verdicts = {rest[row.index]: _verdict(row, version, self._weights) for row in outcome.rows}
        if outcome.blamed is not None:
            blamed = rest[outcome.blamed]
            if outcome.ending is Ending.DIED and blamed not in died:
                died.add(blamed)
            else:
                verdicts[blamed] = self._blame(outcome, batch.verifier, version)
        if outcome.ending is not Ending.DONE or self._child.worn:
            await self.drop()
        return verdicts, outcome.detail

    def _blame(self, outcome: Outcome, verifier: str, version: str) -> Verdict:
        status, detail = VerdictStatus.FAILED, outcome.detail
        if outcome.ending is Ending.OVERDUE:
            status, detail = VerdictStatus.TIMED_OUT, f"no verdict within {self._limits.setting_of(verifier)}"
        return unscored(status, outcome.blamed_wall_s, f"{verifier}: {detail}", version)


class _Given:
    """An `Overflow` that translates positions among the asked samples to indices of the batch."""

    def __init__(self, overflow: Overflow) -> None:
        self.after_s = overflow.after_s
        self.asked: list[int] = []
        self.away: set[int] = set()
        self._overflow = overflow

    def wanted(self) -> bool:
        return self._overflow.wanted()

    def take(self, positions: Sequence[int]) -> None:
        indices = [self.asked[position] for position in positions]
        self.away.update(indices)
        self._overflow.take(indices)


def _missing(batch: Batch, verdicts: Mapping[int, Verdict], given: _Given | None) -> list[int]:
    """Samples without a verdict that were not given away."""
    away = given.away if given is not None else ()
    return [index for index in range(len(batch.samples)) if index not in verdicts and index not in away]


def _verdict(row: Row, version: str, weights: Mapping[str, float]) -> Verdict:
    if row.detail:
        return unscored(VerdictStatus.FAILED, row.wall_s, row.detail, version)
    return scored(row.parts, weights, row.wall_s, version)
