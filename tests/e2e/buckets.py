"""A run whose machine is gone with its disk, and the bucket that is left of it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.e2e.programs import TINY, WITH_PROMPTS, Program, survivors_of, wait_until
from tests.platform.object_store import Faults, s3_server

from treadle.platform.storage import open_store

MIRRORED = "checkpoint.mirror="


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """What is left of a run: the URL of its mirror. Other URLs beside it are free for other runs."""

    url: str
    faults: Faults

    def copy(self, name: str) -> str:
        """The mirror under another prefix, for a test of its own: a mirror names its objects relative to itself."""
        target = f"{self.url}-{name}"
        for file in (store := open_store(self.url)).files():
            store.copy_to(file, open_store(target), file)
        return target


@contextmanager
def served_bucket() -> Iterator[Bucket]:
    """An empty one, while the block lasts."""
    with pytest.MonkeyPatch.context() as environ, s3_server(environ) as (root, faults):
        yield Bucket(url=f"{root}/lost-{secrets.token_hex(4)}", faults=faults)


def lose_a_run(folder: Path, bucket: Bucket) -> None:
    """A run that has six steps to make is mirrored there. Its machine goes in the fifth, when four are mirrored."""
    program = Program(
        words=("run", str(TINY), WITH_PROMPTS, f"{MIRRORED}{bucket.url}", "--dir", str(folder)),
        environment={"TREADLE_FAILPOINTS": "learner.before_step=sleep:500@5"},
    )
    process = program.start()
    try:
        assert wait_until(lambda: mirrored_step(folder) == 4 or process.poll() is not None, 900)
        assert process.poll() is None, process.communicate()
    finally:
        end(process, program.mark)
    shutil.rmtree(folder)


def end(process: subprocess.Popen[str], mark: str) -> None:
    """The machine is gone: the driver, and whatever it has started."""
    for line in survivors_of(mark):
        with suppress(ProcessLookupError):
            os.kill(int(line.split()[0]), signal.SIGKILL)
    process.communicate(timeout=60)


def mirrored_step(folder: Path) -> int:
    """The newest mirrored one, as the run folder says; -1 before there is one."""
    file = folder / "mirror.json"
    return int(json.loads(file.read_text())["step"]) if file.exists() else -1


def made(folder: Path, steps: int) -> bool:
    """Whether the run has made that many steps."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return any(line["step"] == steps - 1 for line in lines)


def kinds(folder: Path) -> list[str]:
    """Of all events of a run so far."""
    file = folder / "events.jsonl"
    return [json.loads(line)["kind"] for line in file.read_text().splitlines()] if file.exists() else []
