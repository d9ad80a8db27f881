"""What a process of ours says to Linux about itself. Imports the standard library alone."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h


def die_with(parent: int) -> None:
    """Ends this process with its parent, also when the parent is killed or died before this call."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def name_process(name: str) -> None:
    """What `ps` and `top` show: at most 15 characters."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


def keep_freed_memory() -> None:
    """Memory that this process frees stays with it, for the next step to take.

    glibc gives it back, and Linux clears every page anew before it is used again: for the activations of a training
    step on a CPU some hundred megabytes, each step. Without glibc nothing changes.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((_M_TRIM_THRESHOLD, 2**31 - 1), (_M_MMAP_MAX, 0), (_M_ARENA_MAX, 1)):
            libc.mallopt(option, value)
