"""Who plays which role: on a game day every role process notes itself, so that it can be struck from outside.

With TREADLE_FAILPOINTS_ROLL=<folder>, `enlist("rollout-1")` leaves a file of that name there with the process's id and
machine; a successor's note replaces it. Without the variable nothing happens.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

ENV_ROLL = "TREADLE_FAILPOINTS_ROLL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Enlisted:
    """A process, and when it noted itself (Unix seconds): one that has started later only has the same id."""

    name: str
    pid: int
    host: str
    since_unix_s: float


def enlist(name: str) -> None:
    """Notes this process under its role's name and number."""
    if not (roll := os.environ.get(ENV_ROLL)):
        return
    folder = Path(roll)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{name}-{os.getpid()}"
    draft.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    draft.replace(folder / name)


def called(folder: Path) -> dict[str, Enlisted]:
    """All notes in a folder, by name."""
    found = {}
    for file in sorted(folder.glob("[!.]*")) if folder.is_dir() else ():
        said = json.loads(file.read_text())
        found[file.name] = Enlisted(
            name=file.name, pid=said["pid"], host=said["host"], since_unix_s=file.stat().st_mtime
        )
    return found
