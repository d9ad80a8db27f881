"""Rollout workers and verifier processes that join and leave while a run goes on.

`treadle scale RUN rollout.workers=4` leaves a request in the run folder; the driver obeys it, tells what it did as an
event, and `treadle status` shows it. What was asked last holds for later attempts of the run, too, until
`treadle resume` is given settings of its own.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.platform.errors import ConfigError, DataError, TreadleError
from treadle.workflows.folder import RunFolder, read_json, write_json

if TYPE_CHECKING:
    from treadle.workflows.run import Run

FILE = "scale.json"
WORKERS, PROCESSES = "rollout.workers", "verify.processes"
SETTINGS = (WORKERS, PROCESSES)
SCALED, REFUSED = "scaled", "scale_refused"


def ask(path: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """`treadle scale`: checks the request and leaves it for the driver. Nothing is asked if a check fails."""
    from treadle.workflows.progress import holder
    from treadle.workflows.recipe import load_recipe

    folder = RunFolder.existing(path)
    if not wanted:
        raise ConfigError(
            "scale: nothing to change.", f"Give {' or '.join(f'{name}=4' for name in SETTINGS)}."
        )
    for word in wanted:
        if (name := word.partition("=")[0].strip()) not in SETTINGS:
            raise ConfigError(
                f"scale: {name} cannot change while a run goes on.",
                f"Only {' and '.join(SETTINGS)} can; stop the run for the rest, and give it to `treadle resume`.",
            )
    recipe = load_recipe(folder.config, wanted)
    if not holder(folder.state()):
        raise ConfigError(
            f"{path} is not being run.", f"Continue it with: treadle resume {path} {' '.join(wanted)}"
        )
    sizes = {WORKERS: recipe.rollout.workers, PROCESSES: recipe.verify.processes}
    named = {word.partition("=")[0].strip() for word in wanted}
    asked = {**_asked(folder), **{name: sizes[name] for name in SETTINGS if name in named}}
    write_json(path / FILE, {"id": secrets.token_hex(8), "asked_unix_s": time.time(), "sizes": asked})
    text = ", ".join(f"{name}={asked[name]}" for name in sorted(named))
    return {"asked": asked, "text": f"asked for {text}; `treadle status {path}` says how far it is"}


def forget(path: Path) -> None:
    """What was asked for before no longer holds."""
    (path / FILE).unlink(missing_ok=True)


def _asked(folder: RunFolder) -> dict[str, int]:
    file = folder.path / FILE
    return dict(_checked(read_json(file).get("sizes"))) if file.exists() else {}


def _checked(sizes: object) -> Mapping[str, int]:
    """Raises `DataError`: the file may have been written by anybody."""
    if not isinstance(sizes, dict):
        raise DataError(f"{FILE} holds no sizes.", "Ask with `treadle scale`.")
    for name, size in sizes.items():
        if name not in SETTINGS or isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise DataError(f"{FILE}: {name}={size!r}.", f"{' and '.join(SETTINGS)} are counts from 1 up.")
    return sizes


class Scaler:
    """The driver's side.

    consumes: the request in the run folder; waits for: workers that join or leave; unblocked by: them, or their
    deadlines; produces: an event. One request at a time; the newest counts.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._done = ""
        self.doing = ""

    async def look(self) -> None:
        """Obeys a request that is new, once engines and verifiers are up. Raises `FencedError` where another process
        has taken the run over: what is asked is asked of that one."""
        run, file = self._run, self._run.folder.path / FILE
        if not run.crew.engines_ready or not file.exists():
            return
        request: dict[str, Any] = {}
        try:
            request = read_json(file)
            if request.get("id") == self._done:
                return
            sizes = _checked(request.get("sizes"))
        except DataError as error:
            if request.get("id", error.message) != self._done:
                self._done = str(request.get("id", error.message))
                self._refused(error.message)
            return
        await asyncio.to_thread(run.ledger.check_held)
        self._done = str(request.get("id"))
        await self._obey(sizes)

    async def _obey(self, sizes: Mapping[str, int]) -> None:
        self.doing = ", ".join(f"{name}={size}" for name, size in sizes.items())
        began = time.monotonic()
        told: dict[str, Any] = dict(sizes)
        try:
            if size := sizes.get(PROCESSES):
                await self._run.crew.resize_verifiers(size)
            if size := sizes.get(WORKERS):
                resized = await self._run.crew.resize_workers(size)
                for why in resized.refused.values():
                    self._refused(why)
                told["joined"], told["left"] = ", ".join(resized.joined), ", ".join(resized.left)
                told["handed_back"] = ", ".join(resized.handed_back)
        except TreadleError as error:
            self._refused(error.message)
        else:
            seconds = time.monotonic() - began
            now = ", ".join(f"{name} {count}" for name, count in self._run.crew.sizes().items())
            self._run.tracker.say(f"scaled to {self.doing} within {seconds:.1f} s; now {now}")
            self._run.tracker.event(SCALED, {**told, "seconds": round(seconds, 3)})
        finally:
            self.doing = ""

    def _refused(self, why: str) -> None:
        self._run.tracker.say(f"warning: the run could not be scaled: {why}")
        self._run.tracker.event(REFUSED, {"message": why})
