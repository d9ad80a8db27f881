"""What a launcher needs of a tier: how a job's files get in place, and what a forked process gives up."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
"""Where programs and libraries live; everybody may read them."""
SETTINGS = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime")
"""Of the host's settings, what toolchains cannot do without, and no more."""
PATH = "/usr/local/bin:/usr/bin:/bin"
FOLDER_PREFIX = "treadle-box-"
"""Of the folders that a launcher makes for jobs; its process id follows, so that they can be found after it."""
MARK_FD = 3
"""Where a process writes that its own setting up is over, and what went wrong before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A command as the launcher has it. `limits` are `Limits` by name; `owner` is the user and group id it runs
    as, or None to keep ours."""

    argv: tuple[str, ...]
    files: Mapping[str, bytes]
    limits: Mapping[str, float]
    file_bytes: int
    processes: int
    owner: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What to execute: arguments, environment, working folder, the descriptors it inherits, those that are
    needed until it is executed, and the file in which it leaves its mark where it cannot inherit `MARK_FD`."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    folder: str
    inherited: tuple[int, ...] = ()
    private: tuple[int, ...] = ()
    mark: str = ""


class Confinement(Protocol):
    """One tier. `prepare` and `finish` run in the launcher, `confine` in the forked process before it
    executes; `overfull` says whether a job has written more than it may.

    `counts_alone`: the kernel counts a job's processes apart from all others of its user. `limits_inside`: the
    tier sets the limits per process, and what it executes must not have them. `overhead_bytes`: resident memory
    that is the tier's own."""

    counts_alone: bool
    limits_inside: bool
    overhead_bytes: int

    def prepare(self, job: Job) -> Prepared: ...

    def confine(self) -> None: ...

    def overfull(self) -> bool: ...

    def finish(self) -> None: ...


def environment(home: str, toolchains: Sequence[str]) -> dict[str, str]:
    """All that a program finds in its environment; the same for every run, so that verdicts repeat."""
    return {
        "PATH": ":".join((*(f"{prefix}/bin" for prefix in toolchains), PATH)),
        "HOME": home,
        "TMPDIR": home,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "MALLOC_ARENA_MAX": "2",
        "OPENSSL_CONF": "/dev/null",  # Node ends when it may not read the host's
    }


def started(job: Job) -> tuple[str, ...]:
    """The command behind a shell that limits the number of processes and says that all is set up.

    The limit must be set last: counted per user and namespace, it would otherwise count the host's."""
    n = job.processes
    limit = f"{{ ulimit -p {n} 2>/dev/null || ulimit -u {n}; }}"  # dash's letter, bash's letter
    script = f'{limit} && printf . >&{MARK_FD} && exec {MARK_FD}>&- && exec "$@"'
    return ("/bin/sh", "-c", script, "sh", *job.argv)


def memory_file(name: str, content: bytes) -> int:
    """A read-only descriptor of these bytes, at their start."""
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return fd
