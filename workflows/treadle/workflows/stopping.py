"""Stopping a run from outside: a file in its folder, which every kind of run reads, wherever its process is.

The file names the attempt that it is for, so that an old one stops nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from treadle.platform.errors import DataError, Interrupted
from treadle.workflows.folder import RunFolder, read_json, write_json

if TYPE_CHECKING:
    from treadle.workflows.run import Run

STOP_FILE = "stop.json"
LOOK_S = 1.0


def ask_to_stop(folder: RunFolder, deadline_s: float) -> None:
    """Asks the attempt that runs now to commit and end within so many seconds."""
    attempt = int(folder.state().get("attempts", 0))
    write_json(folder.path / STOP_FILE, {"attempt": attempt, "deadline_s": deadline_s, "unix_s": time.time()})


@dataclass(slots=True)
class Stop:
    """What a request to stop does: `run`, once there is one, hears of it first."""

    run: Run | None = None
    overdue: bool = False


@asynccontextmanager
async def stoppable(folder: RunFolder, attempt: int, told: Callable[[str], None]) -> AsyncIterator[Stop]:
    """Ends the block with `Interrupted` where it is asked to: the run commits the step at hand and raises it; what has
    not ended by the deadline, or has no run yet, is cancelled.

    consumes: the stop file; waits for: it, then for the deadline; unblocked by: the clock, or the block's end;
    produces: `Run.stop`, then a cancellation.
    """
    stop, block = Stop(), asyncio.current_task()
    assert block is not None

    async def obey() -> None:
        while (deadline_s := await asyncio.to_thread(_asked, folder.path, attempt)) is None:
            await asyncio.sleep(LOOK_S)
        if stop.run is not None:
            told(f"Asked to stop: a commit after this step, if it ends within {deadline_s:g} s.")
            stop.run.stop()
            await asyncio.sleep(deadline_s)
        stop.overdue = True
        block.cancel()

    obeying = asyncio.create_task(obey(), name="obey")
    try:
        yield stop
    except asyncio.CancelledError:
        if not stop.overdue:
            raise
        block.uncancel()
        raise Interrupted("Stopped on request, without another commit.") from None
    finally:
        obeying.cancel()
        await asyncio.gather(obeying, return_exceptions=True)
        with suppress(OSError):
            if _asked(folder.path, attempt) is not None:
                (folder.path / STOP_FILE).unlink(missing_ok=True)


def _asked(folder: Path, attempt: int) -> float | None:
    """The deadline of a request to this attempt, in seconds; None without one, or while it cannot be read."""
    try:
        asked = read_json(folder / STOP_FILE)
        return float(asked["deadline_s"]) if int(asked["attempt"]) == attempt else None
    except (DataError, KeyError, TypeError, ValueError):
        return None
