"""Who watches the driver: a thread, because a driver that hangs cannot say so itself.

A driver that is frozen as a whole (SIGSTOP, a suspended machine) says nothing, and its time does not count:
`treadle status` finds that out from outside.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from treadle.platform.errors import DeadlineError
from treadle.platform.stacks import places

TICK_S = 0.5


@asynccontextmanager
async def guarded(
    deadline_s: float, doing: Callable[[], str], told: Callable[[DeadlineError], None]
) -> AsyncIterator[None]:
    """Ends the process where its event loop does not turn for `deadline_s` while the block runs; 0 never does.

    consumes: beats of the event loop; waits for: the next one; unblocked by: its clock; produces: one sentence on
    standard error and a call of `told` (from the thread), then exit code 1. `doing` says what the driver was at.
    """
    beats, over, thread = [0], threading.Event(), threading.get_ident()

    async def beat() -> None:
        while True:
            beats[0] += 1
            await asyncio.sleep(TICK_S)

    def watch() -> None:
        seen, silent_s = 0, 0.0
        while not over.is_set():
            time.sleep(TICK_S)  # counted, not measured: while the whole process is frozen, nobody is late
            silent_s = silent_s + TICK_S if beats[0] == seen else 0.0
            seen = beats[0]
            if silent_s >= deadline_s and not over.is_set():
                _end(deadline_s, thread, doing(), told)

    beating = asyncio.create_task(beat(), name="beat of the driver")
    if deadline_s:
        threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


def _end(deadline_s: float, thread: int, doing: str, told: Callable[[DeadlineError], None]) -> None:
    where = places(thread) or "outside of our code"
    error = DeadlineError(
        f"driver: it hangs {where}, for {deadline_s:g} s, in {doing}.",
        "Continue with `treadle resume`; recovery.driver_deadline_s allows longer.",
    )
    with suppress(Exception):  # whatever else is broken, the sentence must be said and the process must end
        told(error)
    sys.stderr.write(f"treadle: {type(error).__name__}: {error}\n")
    sys.stderr.flush()
    os._exit(error.exit_code)
