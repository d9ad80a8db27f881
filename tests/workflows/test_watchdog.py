"""The thread that watches the driver. Every case is a process of its own, because the watched one ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time

import pytest

pytestmark = pytest.mark.processes

PRELUDE = """
import asyncio, sys, time
from treadle.workflows import watchdog
watchdog.TICK_S = 0.05
def told(error): print("told:", error.message, flush=True)
async def guarded(deadline_s, work):
    async with watchdog.guarded(deadline_s, lambda: "rl, step 3, learn", told):
        await work()
"""


def started(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_event_loop_that_stands_still_ends_the_process_with_a_sentence() -> None:
    process = started(
        """
        async def work():
            await asyncio.sleep(0.2)
            time.sleep(600)
        asyncio.run(guarded(0.5, work))
        """
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out.startswith("told: driver: it hangs ")
    assert "for 0.5 s, in rl, step 3, learn." in out
    assert err.count("treadle: DeadlineError: driver: it hangs") == 1
    assert "recovery.driver_deadline_s" in err


@pytest.mark.parametrize(("deadline_s", "block_s"), [(0.0, 0.6), (5.0, 0.6)])
def test_a_short_stand_and_no_deadline_end_nothing(deadline_s: float, block_s: float) -> None:
    process = started(
        f"""
        async def work():
            time.sleep({block_s})
        asyncio.run(guarded({deadline_s}, work))
        print("well", flush=True)
        """
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "well\n", "")


def test_a_process_that_was_frozen_as_a_whole_is_not_ended_when_it_wakes() -> None:
    process = started(
        """
        async def work():
            print("here", flush=True)
            await asyncio.sleep(1.0)
        asyncio.run(guarded(1.0, work))
        print("well", flush=True)
        """
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "well\n", "")


def test_the_watch_ends_with_the_block() -> None:
    process = started(
        """
        async def main():
            async def work(): await asyncio.sleep(0.1)
            await guarded(0.3, work)
            time.sleep(1.0)
            print("well", flush=True)
        asyncio.run(main())
        """
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "well\n", "")
