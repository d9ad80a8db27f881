"""Keeps one process alive and gets every sample of a batch a verdict, whatever the process does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treadle.actors.verify.composite import ScoringSpec
from treadle.actors.verify.process import Child, ChildError, Ending, Outcome, Row
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


def merged(batches: Sequence[Batch]) -> Batch:
    """One batch of several for the same verifier: a round trip to a process costs more than most scores."""
    samples: list[tuple[str, bool, int]] = []
    payloads: list[Mapping[str, Json]] = []
    for batch in batches:
        samples.extend((text, finished, len(payloads) + index) for text, finished, index in batch.samples)
        payloads.extend(batch.payloads)
    return Batch(verifier=batches[0].verifier, payloads=tuple(payloads), samples=tuple(samples))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a process may use up."""

    deadline_s: float
    startup_deadline_s: float
    memory_bytes: int


class Runner:
    """Judges batches one after the other, in a process that it replaces when it must.

    A sample is judged again only when its process ended before its verdict arrived and another sample was to
    blame; the one to blame gets `timed_out` (its deadline passed) or `failed` (the process ended by itself).
    """

    def __init__(self, spec: ScoringSpec, limits: Limits) -> None:
        self._spec = spec
        self._limits = limits
        self._child: Child | None = None
        self.starts = 0

    async def judge(self, batch: Batch) -> tuple[Verdict, ...]:
        """One verdict per sample, in order. Returns as soon as all are known, also with a dead process."""
        verdicts: dict[int, Verdict] = {}
        fruitless = 0
        while len(verdicts) < len(batch.samples):
            rest = [index for index in range(len(batch.samples)) if index not in verdicts]
            try:
                found, detail = await self._attempt(batch, rest)
                fruitless = 0 if found else fruitless + 1
            except ChildError as error:
                found, detail = {}, error.detail
                fruitless = fruitless + 1 if error.fatal else FRUITLESS
            verdicts |= found
            if fruitless >= FRUITLESS:
                failure = unscored(VerdictStatus.FAILED, 0.0, f"{batch.verifier}: {detail}", batch.verifier)
                verdicts |= dict.fromkeys(rest, failure)
        return tuple(verdicts[index] for index in range(len(batch.samples)))

    async def ready(self, verifier: str = "") -> str:
        """A living process that has built the verifier (if one is named); returns its version. Raises
        `ChildError`."""
        if self._child is None:
            limits = self._limits
            self.starts += 1
            self._child = await Child.start(
                self._spec, limits.memory_bytes, limits.deadline_s, limits.startup_deadline_s
            )
        try:
            return await self._child.prepare(verifier, self._limits.startup_deadline_s) if verifier else ""
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

    async def _attempt(self, batch: Batch, rest: list[int]) -> tuple[dict[int, Verdict], str]:
        version = await self.ready(batch.verifier)
        assert self._child is not None
        samples = [batch.samples[index] for index in rest]
        try:
            outcome = await self._child.judge(
                batch.verifier, batch.payloads, samples, self._limits.deadline_s
            )
        except BaseException:  # cancelled in mid-conversation: what the process says next would be misread
            await self.drop()
            raise
        verdicts = {rest[row.index]: _verdict(row, version) for row in outcome.rows}
        if outcome.blamed is not None:
            verdicts[rest[outcome.blamed]] = _blame(outcome, batch.verifier, version)
        if outcome.ending is not Ending.DONE:
            await self.drop()
        return verdicts, outcome.detail


def _verdict(row: Row, version: str) -> Verdict:
    if row.detail:
        return unscored(VerdictStatus.FAILED, row.wall_s, row.detail, version)
    return scored(row.parts, row.wall_s, version)


def _blame(outcome: Outcome, verifier: str, version: str) -> Verdict:
    late = outcome.ending is Ending.OVERDUE
    status = VerdictStatus.TIMED_OUT if late else VerdictStatus.FAILED
    return unscored(status, outcome.blamed_wall_s, f"{verifier}: {outcome.detail}", version)
