"""The processes beneath a launcher: what they use, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import defaultdict
from dataclasses import dataclass

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
END_S = 5.0
"""Processes that have not ended this long after SIGKILL hang in the kernel."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds of processor time and bytes of resident memory of living processes. Processor time of ended
    ones counts where their parent waited for them."""

    cpu_s: float
    resident_bytes: int


def usage(root: int) -> Usage:
    """What all living descendants of a process use; pages that several of them share count for each.

    Reads `/proc` once: the kernel lists a process's children only where it was built to."""
    stats = _stats()
    children = defaultdict(list)
    for pid, (parent, _, _) in stats.items():
        children[parent].append(pid)
    cpu_s, resident_bytes = 0.0, 0
    waiting = [root]
    while waiting:
        for pid in children.pop(waiting.pop(), ()):
            cpu_s += stats[pid][1]
            resident_bytes += stats[pid][2]
            waiting.append(pid)
    return Usage(cpu_s, resident_bytes)


def end_children(group: int) -> int | None:
    """Ends all descendants of this process, which must be their subreaper; returns how the process `group`
    ended, or None when it had been waited for already. Raises `TimeoutError` after `END_S`.

    The signal to the group is atomic against forks. What left the group comes to us as its parents end."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    status = None
    until_s = time.monotonic() + END_S
    pause_s = 0.0002
    while True:
        try:
            pid, found = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == group:
            status = found
        if pid:
            continue
        for child, (parent, _, _) in _stats().items():
            if parent == os.getpid():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(child, signal.SIGKILL)
        if time.monotonic() > until_s:
            raise TimeoutError("processes do not end after SIGKILL")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.02)


def threads_of(user: int) -> int:
    """Threads of all processes of a user, as the kernel's limit per user counts them."""
    found = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{name}").st_uid == user:
                    found += len(os.listdir(f"/proc/{name}/task"))
    return found


def _stats() -> dict[int, tuple[int, float, int]]:
    """Parent, processor seconds and resident bytes of every process that can be seen."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                # Behind the command's name, which may hold anything, closing parentheses included.
                fields = file.read().rpartition(b")")[2].split()
                ticks = sum(map(int, fields[11:15]))
                found[int(name)] = (int(fields[1]), ticks * _TICK_S, int(fields[21]) * _PAGE_BYTES)
    return found
