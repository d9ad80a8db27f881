"""One killable process, seen from the pool.

A thread cannot be stopped and a signal only interrupts bytecode, so the one deadline that always holds is
SIGKILL on a process group of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from time import monotonic
from typing import IO, TYPE_CHECKING, Protocol, cast

from treadle.actors.verify.forking import REAP_S, ChildError, Forked, ForkServer, last_line
from treadle.actors.verify.frames import HEADER, MAX_REPLY_BYTES, Progress, encode

if TYPE_CHECKING:
    from treadle.platform.records import Json

PICKUP_S = 5.0
"""A process that has not begun a batch by then is stopped or broken; no sample is to blame."""
SETTLE_S = 0.02
"""Before a kill, time for an answer that has already arrived to be read."""
_STUCK_NICENESS = 10


class Ending(Enum):
    DONE = "done"
    OVERDUE = "overdue"  # a sample passed its deadline
    STUCK = "stuck"  # the process did not even begin
    DIED = "died"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sample's score. `detail` is empty when scored, else says how the verifier failed."""

    index: int
    parts: tuple[tuple[str, float], ...]
    wall_s: float
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a batch went: the rows that came back, how it ended, and the sample that was being judged."""

    rows: tuple[Row, ...]
    ending: Ending
    blamed: int | None
    blamed_wall_s: float
    detail: str


class Overflow(Protocol):
    """Who takes the other samples of a batch when one does not end."""

    after_s: float
    """How long a sample takes before it counts as stuck."""

    def wanted(self) -> bool:
        """Whether another process could judge them now."""
        ...

    def take(self, positions: Sequence[int]) -> None:
        """These samples will be judged elsewhere."""
        ...


@dataclass(frozen=True, slots=True)
class Built:
    """A verifier that a process has built. Only verdicts of a deterministic one may be used again."""

    version: str = ""
    deterministic: bool = False


class Child:
    """One incarnation of the process. One batch at a time.

    consumes: batches; waits for: rows, until the deadline of the sample at work; unblocked by: the socket
    (an answer or its closing) or the clock; produces: outcomes.
    """

    def __init__(
        self,
        forked: Forked,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        progress: Progress,
        output: IO[bytes],
    ) -> None:
        self._forked = forked
        self._reader, self._writer = streams
        self._progress = progress
        self._output = output
        self._built: dict[str, Built] = {}
        self._killed = False
        self._niceness = 0
        self.worn = False

    @property
    def pid(self) -> int:
        return self._forked.pid

    @classmethod
    async def start(cls, forks: ForkServer, startup_deadline_s: float) -> Child:
        """Starts the process and waits until it listens. Raises `ChildError`."""
        ours, theirs = socket.socketpair()
        progress, fd = Progress.create()
        output = tempfile.TemporaryFile()  # noqa: SIM115  closed with the child
        try:
            forked = await forks.fork(theirs.fileno(), fd, output.fileno())
        except BaseException:  # no process: it could not be started, or nobody waits for it any more
            ours.close()
            progress.close()
            output.close()
            raise
        finally:
            theirs.close()
            os.close(fd)
        try:
            child = cls(forked, await asyncio.open_unix_connection(sock=ours), progress, output)
        except BaseException:  # cancelled
            forked.kill()
            await forked.reap()
            raise
        try:
            await child._answer(startup_deadline_s, "start")
        except BaseException:  # a cancelled start must not leave a process behind
            child.kill()
            await child.reap()
            child.close()
            raise
        return child

    async def prepare(self, name: str, deadline_s: float) -> Built:
        """Has the process build a verifier, once. Raises `ChildError`."""
        if name not in self._built:
            answer = await self._ask({"prepare": name}, deadline_s, f"prepare {name}")
            self._built[name] = Built(str(answer["ready"]), bool(answer["deterministic"]))
        return self._built[name]

    async def judge(
        self,
        name: str,
        payloads: Sequence[Mapping[str, Json]],
        samples: Sequence[tuple[str, bool, int]],
        deadline_s: float,
        overflow: Overflow | None = None,
    ) -> Outcome:
        """Scores samples: completion, whether it came to its end, index of its payload. Rows carry their
        position in `samples`; those that `overflow` took may have one or not."""
        self._progress.stop_before(Progress.NEVER)
        if overflow is not None:
            rows: list[Row] = []
            watching = asyncio.create_task(self._shed(overflow, len(samples), rows))
            try:
                return await self._converse(name, payloads, samples, deadline_s, rows)
            finally:
                watching.cancel()
                self._set_niceness(0)
        return await self._converse(name, payloads, samples, deadline_s, [])

    async def _shed(self, overflow: Overflow, samples: int, rows: Sequence[Row]) -> None:
        """Gives all but a stuck sample away, once another process can take it: what waits behind it, and what was
        judged before it and has not been sent."""
        while True:
            await asyncio.sleep(overflow.after_s)
            index, began_s = self._progress.read()
            stuck = index != Progress.IDLE and monotonic() - began_s >= overflow.after_s
            if stuck:
                self._set_niceness(_STUCK_NICENESS)
            known = {index, *(row.index for row in rows)}
            others = [position for position in range(samples) if position not in known]
            if stuck and overflow.wanted() and others:
                self._progress.stop_before(index + 1)
                overflow.take(others)
                return

    def _set_niceness(self, niceness: int) -> None:
        """A stuck process leaves the cores to the others. Who is not root cannot take that back: such a process is
        `worn`."""
        if niceness == self._niceness or self._killed:
            return
        try:
            os.setpriority(os.PRIO_PROCESS, self.pid, niceness)
        except PermissionError:
            self.worn = True
        except ProcessLookupError:
            return
        self._niceness = niceness

    async def _converse(
        self,
        name: str,
        payloads: Sequence[Mapping[str, Json]],
        samples: Sequence[tuple[str, bool, int]],
        deadline_s: float,
        rows: list[Row],
    ) -> Outcome:
        triples: list[Json] = [list(sample) for sample in samples]
        prompts: list[Json] = [dict(payload) for payload in payloads]
        asked: dict[str, Json] = {"judge": name, "payloads": prompts, "samples": triples}
        self._writer.write(encode({**asked, "deadline_s": deadline_s}))
        sent_s = monotonic()
        while True:
            reading = asyncio.ensure_future(self._read())
            try:
                late = await self._wait(reading, sent_s, deadline_s)
            finally:
                reading.cancel()
            if late is not None:
                return self._outcome(rows, late, _lateness(late, deadline_s))
            message = reading.result()
            if message is None:
                return self._outcome(rows, Ending.DIED, await self.epitaph())
            rows.extend(_row(values) for values in cast("list[list[Json]]", message["rows"]))
            if message.get("end"):
                return self._outcome(rows, Ending.DONE, "")

    async def epitaph(self) -> str:
        """How the process ended, and the last line it printed."""
        self.kill()
        await self.reap()
        code = self._forked.status
        if code is None:
            ended = f"does not end within {REAP_S:g} s after SIGKILL, or its parent has ended"
        elif code < 0:
            ended = f"was killed by {signal.Signals(-code).name}"
        else:
            ended = f"ended with status {code}"
        line = last_line(self._output)
        return f"the process {ended}" + (f": {line}" if line else "")

    def kill(self) -> None:
        """Ends the process and all it started; does not wait."""
        if not self._killed:
            self._killed = True
            self._forked.kill()
            self._writer.close()

    async def reap(self) -> None:
        """Collects the ended process."""
        await self._forked.reap()

    def close(self) -> None:
        """Frees what belongs to an ended process."""
        self._progress.close()
        self._output.close()

    async def _ask(self, message: dict[str, Json], deadline_s: float, doing: str) -> dict[str, Json]:
        self._writer.write(encode(message))
        return await self._answer(deadline_s, doing)

    async def _answer(self, deadline_s: float, doing: str) -> dict[str, Json]:
        try:
            async with asyncio.timeout(deadline_s):
                answer = await self._read()
        except TimeoutError:
            raise ChildError(f"the process did not {doing} within {deadline_s} s", fatal=True) from None
        if answer is None:
            raise ChildError(f"could not {doing}: {await self.epitaph()}", fatal=True)
        if "error" in answer:
            raise ChildError(str(answer["error"]), fatal=False)
        return answer

    async def _wait(
        self, reading: asyncio.Future[dict[str, Json] | None], sent_s: float, deadline_s: float
    ) -> Ending | None:
        """Waits for the next message; returns how it is late, or None when it is there."""
        while True:
            due_s = self._due(sent_s, deadline_s)
            # A sample that begins during this wait is due a deadline later, so look again by then.
            await asyncio.wait({reading}, timeout=min(max(due_s - monotonic(), 0.0), deadline_s))
            if not reading.done() and monotonic() >= due_s:
                await asyncio.wait({reading}, timeout=SETTLE_S)
            if reading.done():
                return None
            if monotonic() >= due_s == self._due(sent_s, deadline_s):
                index, _ = self._progress.read()
                return Ending.STUCK if index == Progress.IDLE else Ending.OVERDUE

    def _due(self, sent_s: float, deadline_s: float) -> float:
        """When the sample at work, or the taking up of the batch, or the sending of its end is late."""
        index, began_s = self._progress.read()
        return max(sent_s, began_s) + PICKUP_S if index == Progress.IDLE else began_s + deadline_s

    async def _read(self) -> dict[str, Json] | None:
        """The next message; None when the process is gone or sends what no process of ours sends."""
        try:
            size = HEADER.unpack(await self._reader.readexactly(HEADER.size))[0]
            if size > MAX_REPLY_BYTES:
                return None
            return cast("dict[str, Json]", json.loads(await self._reader.readexactly(size)))
        except (asyncio.IncompleteReadError, ConnectionError, ValueError):
            return None

    def _outcome(self, rows: list[Row], ending: Ending, detail: str) -> Outcome:
        index, began_s = self._progress.read()
        answered = {row.index for row in rows}
        blamed = None if ending is Ending.DONE or index == Progress.IDLE or index in answered else index
        if ending is not Ending.DONE:
            self.kill()
        wall_s = monotonic() - began_s if blamed is not None else 0.0
        return Outcome(rows=tuple(rows), ending=ending, blamed=blamed, blamed_wall_s=wall_s, detail=detail)


def _lateness(ending: Ending, deadline_s: float) -> str:
    if ending is Ending.OVERDUE:
        return f"no verdict within {deadline_s:g} s"
    return f"the process did not begin within {PICKUP_S} s"


def _row(values: list[Json]) -> Row:
    index, parts, wall_s, detail = values
    pairs = cast("list[tuple[str, float]]", parts)
    return Row(
        index=cast(int, index),
        parts=tuple((name, float(value)) for name, value in pairs),
        wall_s=cast(float, wall_s),
        detail=str(detail),
    )
