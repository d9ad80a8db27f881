"""A request to stop: who hears of it, what it cancels, and when."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from treadle.platform.errors import Interrupted
from treadle.workflows import stopping
from treadle.workflows.folder import RunFolder
from treadle.workflows.stopping import STOP_FILE, Stop, ask_to_stop, stoppable


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(stopping, "LOOK_S", 0.02)
    made = RunFolder(tmp_path)
    made.set_state(state="running", attempts=2)
    return made


def play(folder: RunFolder, body: Callable[[Stop], Awaitable[None]], attempt: int = 2) -> list[str]:
    """Runs a body that may be stopped. Returns what was said."""
    said: list[str] = []

    async def main() -> None:
        async with stoppable(folder, attempt, said.append) as stop:
            await body(stop)

    asyncio.run(main())
    return said


def test_the_run_hears_first_and_ends_by_itself(folder: RunFolder) -> None:
    async def body(stop: Stop) -> None:
        heard = asyncio.Event()
        stop.run = SimpleNamespace(stop=heard.set)  # type: ignore[assignment]
        ask_to_stop(folder, 30.0)
        await heard.wait()
        raise Interrupted("Stopped on request after step 3 of rl, which is committed.")

    with pytest.raises(Interrupted, match="after step 3"):
        play(folder, body)
    assert not (folder.path / STOP_FILE).exists(), (
        "an answered request would stop nothing else, but confuse people"
    )


def test_what_does_not_end_by_the_deadline_is_cancelled(folder: RunFolder) -> None:
    asked = 0

    async def body(stop: Stop) -> None:
        def hear() -> None:
            nonlocal asked
            asked += 1

        stop.run = SimpleNamespace(stop=hear)  # type: ignore[assignment]
        ask_to_stop(folder, 0.2)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)  # cleaning up may wait

    began = time.monotonic()
    with pytest.raises(Interrupted, match="without another commit"):
        play(folder, body)
    assert 0.2 <= time.monotonic() - began < 10
    assert asked == 1


def test_a_run_that_is_only_starting_ends_at_once(folder: RunFolder) -> None:
    async def body(_: Stop) -> None:
        ask_to_stop(folder, 600.0)
        await asyncio.sleep(60)

    began = time.monotonic()
    with pytest.raises(Interrupted):
        play(folder, body)
    assert time.monotonic() - began < 10


def test_a_request_to_an_earlier_attempt_or_half_a_file_stops_nothing(folder: RunFolder) -> None:
    async def body(_: Stop) -> None:
        for text in (json.dumps({"attempt": 1, "deadline_s": 0.0}), "{", "[]", '{"attempt": 2}'):
            (folder.path / STOP_FILE).write_text(text)
            await asyncio.sleep(0.1)

    assert play(folder, body) == []


def test_ctrl_c_is_still_ctrl_c(folder: RunFolder) -> None:
    async def body(_: Stop) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        play(folder, body)
