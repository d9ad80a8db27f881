"""The processes of a run by role, and signals to them."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from treadle.platform.rollcall import Enlisted, called

VERIFIER = "verifier"
"""How the processes call themselves that judge for a verify actor."""


@dataclass(frozen=True, slots=True)
class Cast:
    """Finds role processes by the notes that they have left in `roll`, and their children. Only those on this machine
    can be struck; on others the failpoints reach them."""

    roll: Path

    def of(self, role: str) -> Sequence[psutil.Process]:
        """The living processes of a role on this machine, by number."""
        if role == VERIFIER:
            return [child for actor in self.of("verify") for child in _children(actor)]
        notes = [note for note in called(self.roll).values() if note.name.rpartition("-")[0] == role]
        notes.sort(key=lambda note: int(note.name.rpartition("-")[2]))
        return [process for note in notes if (process := living(note)) is not None]

    def one(self, role: str, which: int) -> psutil.Process | None:
        """The process of that number, if it is on this machine and alive."""
        if role == VERIFIER:
            return next(iter(self.of(role)[which : which + 1]), None)
        note = called(self.roll).get(f"{role}-{which}")
        return living(note) if note else None

    def elsewhere(self, role: str, which: int) -> str:
        """The other machine that the process runs on, or nothing."""
        note = called(self.roll).get(f"{role}-{which}")
        return note.host if note and note.host != socket.gethostname() else ""


def living(note: Enlisted) -> psutil.Process | None:
    """The process that has left a note, unless it is gone, frozen or on another machine."""
    if note.host != socket.gethostname():
        return None
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(note.pid)
        if process.create_time() < note.since_unix_s + _CLOCKS_S and process.status() not in _ENDED:
            return process
    return None


_CLOCKS_S = 1.0
"""The kernel's clock of processes and that of files may differ by so much."""
_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD, psutil.STATUS_STOPPED)


def strike(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether it was there to be struck."""
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)
        return True
    return False


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [child for child in process.children(recursive=True) if _is_verifier(child)]
    return []


def _is_verifier(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name() == VERIFIER and process.status() not in _ENDED
    return False
