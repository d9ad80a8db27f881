"""Lack of memory: how it is recognised, and what helps against it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PHRASE = "ran out of memory"
"""In every sentence about it."""
NODE_RAN_OUT = f"its node {PHRASE}"
STRUCK = f"{NODE_RAN_OUT}: the kernel ended a process there at that time"
REMEDIES = {
    "learner": "Lower learner.max_tokens_per_microbatch, set learner.activation_checkpointing=true, raise learner.zero "
    "or learner.ranks, or give the learner's nodes more memory.",
    "rollout": "Lower rollout.slots or rollout.max_context_tokens, put fewer workers on a node, or give it more "
    "memory.",
    "verify": "Lower verify.processes, put fewer verify actors on a node, or give it more memory.",
    "coordinator": "Put fewer processes on its node, or give it more memory.",
}
"""By role."""
AT_THE_FLOOR = (
    "Set learner.activation_checkpointing=true, raise learner.zero or learner.ranks, shorten the longest sequences, or "
    "give the learner's nodes more memory."
)
"""For a learner whose micro-batches cannot become smaller."""
_WORDS = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")
_VIEWS = (("memory", "memory.oom_control"), ("", "memory.events"))
"""Of control groups, version 1 and 2: the controller's name, and the file that counts."""


def remedy(role: str, cause: str, otherwise: str = "") -> str:
    """What helps against a failure with that cause, if it is a lack of memory."""
    return REMEDIES[role] if PHRASE in cause else otherwise


def ran_out(error: BaseException) -> bool:
    """Whether memory, of the host or of a GPU, could not be had."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _WORDS)


def resident_bytes() -> int:
    """What this process has in memory; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def kernel_kills() -> int:
    """How many processes the kernel has ended so far for want of memory: in this container, else on this machine.

    A process that it ends looks like any other that was killed; this number is what is left of it.
    """
    for file in (*_counters(), Path("/proc/vmstat")):
        try:
            lines = file.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
    return 0


def _counters() -> Iterator[Path]:
    """Of the control group that this process is in, where it is in one of its own. A container may see its group at
    the top."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller, name in _VIEWS:
            if controller in controllers.split(",") and path != "/":
                top = Path("/sys/fs/cgroup") / controller
                yield top / path.strip("/") / name
                yield top / name
