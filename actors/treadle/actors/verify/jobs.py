"""What waits to be judged: pieces of groups, in order of arrival, with a limit per verifier."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

from treadle.actors.verify.runner import Batch
from treadle.platform.errors import VerifierError
from treadle.platform.records import Json, Verdict


class Job:
    """One group. Its verdicts come in piece by piece, in any order; `done` resolves when all are there.

    `keys` are those under which verdicts are to be remembered, by sample.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.done: asyncio.Future[tuple[Verdict, ...]] = asyncio.get_running_loop().create_future()
        self.keys: dict[int, bytes] = {}
        self._verdicts: list[Verdict | None] = [None] * len(batch.samples)
        self._left = len(batch.samples)
        self._twins: dict[int, list[int]] = {}
        if not self._left:
            self.done.set_result(())

    def give(self, index: int, verdict: Verdict) -> None:
        """The verdict of one sample; a second one, by a process that was thought to be slow, is ignored."""
        if self._verdicts[index] is not None:
            return
        self._verdicts[index] = verdict
        self._left -= 1
        for twin in self._twins.pop(index, ()):
            self.give(twin, verdict)
        if not self._left and not self.done.done():
            self.done.set_result(tuple(v for v in self._verdicts if v is not None))

    def twin(self, index: int, other: int) -> None:
        """Sample `other` is equal to sample `index` and gets its verdict."""
        self._twins.setdefault(index, []).append(other)

    def refuse(self, reason: str) -> None:
        """Tells the caller that there will be no verdicts."""
        if not self.done.done():
            self.done.set_exception(VerifierError(f"verify, judge: {reason}."))


@dataclass(frozen=True, slots=True)
class Piece:
    """Samples of a job that are judged together."""

    job: Job
    indices: tuple[int, ...]
    since_s: float = field(default_factory=monotonic)

    @property
    def verifier(self) -> str:
        return self.job.batch.verifier


def merged(pieces: Sequence[Piece]) -> tuple[Batch, list[tuple[Job, int]]]:
    """One batch of several pieces for the same verifier (a round trip to a process costs more than most scores),
    and the job and index of each of its samples."""
    samples: list[tuple[str, bool, int]] = []
    payloads: list[Mapping[str, Json]] = []
    owners: list[tuple[Job, int]] = []
    for piece in pieces:
        first = len(payloads)
        payloads.extend(piece.job.batch.payloads)
        for index in piece.indices:
            text, finished, payload = piece.job.batch.samples[index]
            samples.append((text, finished, first + payload))
            owners.append((piece.job, index))
    return Batch(verifier=pieces[0].verifier, payloads=tuple(payloads), samples=tuple(samples)), owners


class JobQueue:
    """Pieces by verifier. Bounded: whoever puts more waits.

    consumes: pieces; waits for: a place (put), a piece whose verifier has a process to spare (take); unblocked by:
    take, put, release; produces: pieces of one verifier, oldest first.
    """

    def __init__(self, places: int, caps: Mapping[str, int]) -> None:
        self._places = places
        self._caps = caps
        self._waiting: dict[str, deque[Piece]] = {}
        self._running: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return sum(len(pieces) for pieces in self._waiting.values())

    @property
    def samples(self) -> int:
        """Samples that wait."""
        return sum(len(piece.indices) for pieces in self._waiting.values() for piece in pieces)

    @property
    def age_s(self) -> float:
        """For how long the oldest piece that could be judged now has waited; 0 when there is none."""
        heads = [pieces[0].since_s for name, pieces in self._waiting.items() if self._open(name)]
        return monotonic() - min(heads) if heads else 0.0

    async def put(self, piece: Piece) -> None:
        """Waits for a place. A closed queue refuses the piece."""
        await self._until(lambda: self._closed or len(self) < self._places)
        self._add(piece)

    def put_back(self, piece: Piece) -> None:
        """In front, whether there is a place or not: it has had its turn."""
        self._add(piece, front=True)

    async def take(self, room: int, share: int) -> list[Piece]:
        """The oldest piece and what waits for the same verifier: at most `room` samples (but for the first piece)
        and the `share`-th part of what waits, since other processes want some too. Call `release` afterwards."""
        await self._until(lambda: any(map(self._open, self._waiting)))
        name = min(filter(self._open, self._waiting), key=lambda n: self._waiting[n][0].since_s)
        pieces = self._waiting[name]
        taken = [pieces.popleft()]
        company = len(pieces) // max(1, share)
        room -= len(taken[0].indices)
        while pieces and company > 0 and len(pieces[0].indices) <= room:
            taken.append(pieces.popleft())
            room -= len(taken[-1].indices)
            company -= 1
        if not pieces:
            del self._waiting[name]
        self._running[name] += 1
        self._notify()
        return taken

    def release(self, name: str) -> None:
        """A process has finished with the verifier."""
        self._running[name] -= 1
        self._notify()

    def close(self) -> None:
        """Refuses what waits and what comes."""
        self._closed = True
        for pieces in self._waiting.values():
            for piece in pieces:
                piece.job.refuse("the pool was closed")
        self._waiting.clear()
        self._notify()

    def _open(self, name: str) -> bool:
        return self._running[name] < self._caps.get(name, 2**31)

    def _add(self, piece: Piece, front: bool = False) -> None:
        if self._closed:
            piece.job.refuse("the pool was closed")
            return
        pieces = self._waiting.setdefault(piece.verifier, deque())
        if front:
            pieces.appendleft(piece)
        else:
            pieces.append(piece)
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _until(self, met: Callable[[], bool]) -> None:
        while not met():
            await self._changed.wait()
