"""Where the threads of this process are."""

from __future__ import annotations

import sys
import threading
import traceback

_FRAMES = 12


def stacks() -> str:
    """The innermost frames of every Python thread, by name. For a thread that is not the one that hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            lines = "".join(traceback.format_stack(frame)[-_FRAMES:])
            parts.append(f"thread {names.get(ident, ident)}:\n{lines}")
    return "\n".join(parts)
