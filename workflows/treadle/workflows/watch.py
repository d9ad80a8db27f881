"""What every role is doing, written where `treadle status` and an autopsy find it.

`roles.json` in the run folder is replaced every few seconds, off the step's path. `failures/0001.json` and so on hold
what was known at the moment of each failure: the error, every role, and the stacks of the processes that still answer.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.platform.errors import TreadleError
from treadle.platform.stacks import stacks
from treadle.workflows.elastic import Scaler
from treadle.workflows.folder import read_json, write_json
from treadle.workflows.outcomes import as_json, outcome_of
from treadle.workflows.wall_clock import WallClock
from treadle.workflows.watchdog import guarded

if TYPE_CHECKING:
    from treadle.workflows.run import Run

EVERY_S = 5.0
HEED_EVERY_S = 2.0
"""A spot machine has 30 s to two minutes left when it is told."""
CLOCK_SET = "clock_set"
ROLES_FILE, FAILURES_FOLDER = "roles.json", "failures"


@asynccontextmanager
async def watched(run: Run) -> AsyncIterator[None]:
    """Keeps `roles.json` up to date, heeds notices of nodes that leave and requests to scale while the block runs.

    consumes: what roles, Ray's head and operators say; waits for: the next look, every `EVERY_S` or `HEED_EVERY_S`;
    unblocked by: the clock, or the block's end; produces: the file, unless another process has taken the run over,
    `run.leave`, and roles of other sizes. A look that fails is missed, and the next one comes: watching must not end a
    run.
    """

    clock = WallClock()
    scaler = Scaler(run)

    async def look() -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            if moved_s := clock.moved_s():
                _tell_clock(run, moved_s)
            with suppress(OSError, TreadleError):
                seen = {**await _seen(run), "scaling": scaler.doing}
                run.ledger.check_held()
                await asyncio.to_thread(write_json, run.folder.path / ROLES_FILE, seen)
                await asyncio.to_thread(run.tracker.look_at_mlflow)

    async def heed() -> None:
        while True:
            await asyncio.sleep(HEED_EVERY_S)
            with suppress(TreadleError):
                run.leave(await asyncio.to_thread(run.crew.leaving))

    async def scale() -> None:
        while True:
            await asyncio.sleep(HEED_EVERY_S)
            with suppress(OSError, TreadleError):
                await scaler.look()

    def at() -> str:
        stage, step, doing, _ = run.doing()
        return f"{stage or 'the start'}, step {step}{f', {doing}' if doing else ''}"

    def hung(error: TreadleError) -> None:
        state = run.folder.state()
        if int(state.get("pid", 0)) != os.getpid():
            return  # the run has a new driver
        _write_failure(run, error, {"driver": stacks()}, _driver(run))
        told = as_json(outcome_of(error), run.tracker.redactor)
        run.folder.set_state(state="failed", ended_unix_s=time.time(), error=told)

    watches = {"watch roles": look(), "watch nodes": heed(), "watch requests": scale()}
    tasks = [asyncio.create_task(watch, name=name) for name, watch in watches.items()]
    try:
        async with guarded(run.recipe.recovery.driver_deadline_s, at, hung):
            yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _tell_clock(run: Run, moved_s: float) -> None:
    message = (
        f"The machine slept, or its wall clock was set: {moved_s:+.0f} s. Timestamps of metrics, events and MLflow "
        "jump here by as much; deadlines do not depend on it."
    )
    run.tracker.event(CLOCK_SET, {"seconds": round(moved_s, 3), "message": message})
    run.tracker.say(message)


async def record_failure(run: Run, error: TreadleError) -> Path:
    """Writes what is known about a failure while its processes still live. Returns the file."""
    where, seen = await asyncio.gather(run.crew.stacks(), _seen(run))
    return _write_failure(run, error, {"driver": stacks(), **where}, seen)


def _write_failure(run: Run, error: TreadleError, where: Mapping[str, str], seen: Mapping[str, Any]) -> Path:
    folder = run.folder.path / FAILURES_FOLDER
    folder.mkdir(exist_ok=True)
    file = folder / f"{len(list(folder.glob('*.json'))) + 1:04d}.json"
    told = {
        "error": type(error).__name__,
        "message": run.tracker.redactor.message(error.message),
        "remedy": error.remedy,
        "stacks": where,
    }
    write_json(file, {**told, **seen})
    return file


def last_seen(folder: Path) -> dict[str, Any]:
    """`roles.json`, or nothing."""
    return read_json(folder / ROLES_FILE) if (folder / ROLES_FILE).exists() else {}


def first_failure(folder: Path) -> dict[str, Any]:
    """The first failure of the run with its file's name, or nothing."""
    files = sorted((folder / FAILURES_FOLDER).glob("*.json"))
    return {**read_json(files[0]), "file": str(files[0])} if files else {}


async def _seen(run: Run) -> dict[str, Any]:
    lowered = {b.name: f"{b.setting}={b.after}, the recipe says {b.configured}" for b in run.back_offs}
    return {
        **_driver(run),
        "sizes": run.crew.sizes(),
        "lowered": lowered,
        "roles": await run.crew.doing() | _feeding(run),
    }


def _driver(run: Run) -> dict[str, Any]:
    stage, step, doing, for_s = run.doing()
    return {
        "unix_s": time.time(),
        "driver": {"stage": stage, "step": step, "doing": doing, "for_s": round(for_s, 1)},
    }


def _feeding(run: Run) -> dict[str, str]:
    """MLflow among the roles, where it does not take the figures."""
    mlflow = run.tracker.mlflow
    return {"mlflow": mlflow.doing} if mlflow is not None and mlflow.doing else {}
