"""Runs `treadle` as a stranger would: as a program, in a folder of its own, every process it starts marked."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
TREADLE = Path(sys.executable).parent / "treadle"
TINY = REPOSITORY / "tests" / "workflows" / "recipes" / "tiny.yaml"
PROMPTS = TINY.with_name("prompts.jsonl")
WITH_PROMPTS = f"stages.rl.prompts.url={PROMPTS}"
MARK = "TREADLE_TEST_MARK"
PATIENCE_S = 1800.0
"""For one run, which takes a quarter of a minute: only on a machine crowded with other work does it take longer."""
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
RAY_IS_LATE = "Ray does not start"
"""Ray gives its own daemons a fixed time to come up, which a busy machine can pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a program ended and what it said."""

    code: int
    out: str
    err: str
    wall_s: float

    @property
    def complaint(self) -> str:
        """The last line of standard error, which must be the only one that complains."""
        lines = [line for line in self.err.splitlines() if line.startswith("treadle: ")]
        assert len(lines) == 1, self
        return lines[0]


@dataclass(slots=True, kw_only=True)
class Program:
    """One `treadle` command. Its mark is in the environment of whatever it starts, and their children."""

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path = REPOSITORY
    within: tuple[str, ...] = ()
    """Words in front of the command, for a network or a memory of its own."""
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    def surroundings(self) -> dict[str, str]:
        """The environment of the program, with its mark."""
        return {**plain_environment(), **self.environment, MARK: self.mark}

    def start(self) -> subprocess.Popen[str]:
        return self._started(subprocess.PIPE)

    def start_into(self, log: IO[str]) -> subprocess.Popen[str]:
        """With all output in a file: a pipe that nobody reads fills up."""
        return self._started(log)

    def _started(self, output: int | IO[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.within, str(TREADLE), *self.words],
            env=self.surroundings(),
            cwd=self.folder,
            stdout=output,
            stderr=output,
            text=True,
            start_new_session=True,
        )

    def run(self, timeout_s: float = PATIENCE_S) -> Ended:
        began = time.monotonic()
        with self.start() as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
            return Ended(code=process.returncode, out=out, err=err, wall_s=time.monotonic() - began)

    def survivors(self) -> list[str]:
        return survivors_of(self.mark)

    def all_gone(self, within_s: float = 15.0) -> bool:
        return wait_until(lambda: not self.survivors(), within_s)

    def all_but_agents_gone(self, within_s: float = 15.0) -> bool:
        """After a kill -9: Ray's two agents may go on reporting it to their dead GCS for 60 s, then end."""
        return wait_until(lambda: all(line.split()[1] in RAY_AGENTS for line in self.survivors()), within_s)


def survivors_of(mark: str) -> list[str]:
    """Living processes with the mark in their environment: what a program started, itself included."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if f"{MARK}={mark}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes():
                found.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
    return found


def plain_environment() -> dict[str, str]:
    """This process's environment without Ray's and Treadle's variables; the tests' modules are importable."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "TREADLE_"))}
    return {**env, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def wait_until(holds: Callable[[], bool], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.1)
    return holds()


def patiently(*words: str, **environment: str) -> tuple[Program, Ended]:
    """Runs a command; again, where Ray's daemons were too late on a busy machine."""
    for _ in range(5):
        program = Program(words=words, environment=environment)
        ended = program.run()
        if RAY_IS_LATE not in ended.err:
            break
        if words[0] == "run":
            words = (*[word for word in words if word != "--fresh"], "--fresh")
    return program, ended


def interrupted_when(program: Program, due: Callable[[], bool]) -> Ended:
    """Starts the program and presses Ctrl-C once `due` holds: a terminal tells the whole process group."""
    began = time.monotonic()
    process = program.start()
    try:
        assert wait_until(lambda: due() or process.poll() is not None, PATIENCE_S), "nothing happened"
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    except BaseException:
        process.kill()
        raise
    return Ended(code=process.returncode, out=out, err=err, wall_s=time.monotonic() - began)


def summary_of(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / "summary.json").read_text())
    assert isinstance(value, dict)
    return value


def samples_of(folder: Path) -> dict[str, list[tuple[str, int, str, float]]]:
    """Every sample of every step, as kept in `rollouts/`: group, index, completion, reward."""
    from pyarrow.parquet import read_table

    found = {}
    for file in sorted((folder / "rollouts").glob("*.parquet")):
        rows = read_table(file).to_pylist()
        found[file.stem] = [(r["group_id"], r["sample_index"], r["completion"], r["reward"]) for r in rows]
    return found
