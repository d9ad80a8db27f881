"""A part of this machine with little memory, as a container has it: a memory control group (cgroups, version 1)."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.programs import wait_until

MOUNTED = Path("/sys/fs/cgroup/memory")
_ENTER = 'echo $$ > "$0/cgroup.procs" && mount --bind "$0" /sys/fs/cgroup/memory && exec "$@"'
"""The group looks like the only one, as in a container: Ray asks there how much memory its node has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallMemory:
    """The group. `within` are the words in front of a command that is to live in it."""

    folder: Path

    @property
    def within(self) -> tuple[str, ...]:
        return ("unshare", "--mount", "sh", "-c", _ENTER, str(self.folder))

    def take(self, pid: int) -> None:
        """From now on the process and what it starts live in it."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def kills(self) -> int:
        """Processes that the kernel has ended in it."""
        lines = (self.folder / "memory.oom_control").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


@contextmanager
def small_memory(mebibytes: int) -> Iterator[SmallMemory]:
    """While the block lasts; everything in it must have ended by then."""
    folder = _own() / f"trc-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(mebibytes * 2**20))
        with contextlib.suppress(OSError):  # kernels without accounting of swap have none to take
            (folder / "memory.memsw.limit_in_bytes").write_text(str(mebibytes * 2**20))
        yield SmallMemory(folder=folder)
    finally:
        wait_until(lambda: not (folder / "cgroup.procs").read_text(), 20)
        folder.rmdir()


def possible() -> bool:
    """Whether this process may make such groups."""
    root = os.geteuid() == 0 and shutil.which("unshare") is not None
    return root and (MOUNTED / "memory.limit_in_bytes").exists() and os.access(_own(), os.W_OK)


def _own() -> Path:
    """The group this process is in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return MOUNTED / path.strip("/")
    return MOUNTED
