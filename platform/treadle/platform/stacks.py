"""Where the threads of this process are."""

from __future__ import annotations

import sys
import threading
import traceback
from types import FrameType

_FRAMES = 12
_OURS, _NOT_A_PLACE = "/treadle/", ("/platform/stacks.py", "/platform/failpoints.py", "/cluster/template.py")
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
WAITS = "waiting for the other ranks"
"""What `places` says of a thread that is inside a collective."""


def stacks() -> str:
    """The innermost frames of every Python thread, by name. For a thread that is not the one that hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            lines = "".join(traceback.format_stack(frame)[-_FRAMES:])
            parts.append(f"thread {names.get(ident, ident)}:\n{lines}")
    return "\n".join(parts)


def places(thread: int | None = None) -> str:
    """In which of our own functions every other thread is, or one thread by its id, on one line; threads in none of
    them are left out.

    Example: `in stage (actors/rollout/worker.py:96)`.
    """
    frames = (
        frame
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident() and thread in (None, ident)
    )
    return ", ".join(place for frame in frames if (place := _place(frame)))


def _place(innermost: FrameType) -> str:
    frame: FrameType | None = innermost
    waits = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if _OURS in file and not file.endswith(_NOT_A_PLACE):
            return f"{waits}in {frame.f_code.co_name} ({file.rpartition(_OURS)[2]}:{frame.f_lineno})"
        if any(part in file for part in _COLLECTIVES):
            waits = f"{WAITS} "
        frame = frame.f_back
    return ""
