"""The strongest local tier: bubblewrap's namespaces around a file system that holds toolchains only."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence

from treadle.actors.verify.programs.confinement import (
    SETTINGS,
    SYSTEM,
    Job,
    Prepared,
    environment,
    memory_file,
    started,
)
from treadle.actors.verify.programs.records import BOX

_SHARED_MEMORY_BYTES = 16 * 2**20


class Bubblewrap:
    """Implements `Confinement`. Namespaces of users, processes, network, IPC and host name; a root of
    read-only binds and size-capped tmpfs; when process 1 of the namespace ends, the kernel ends the rest.

    Without privileges: the launcher has dropped them before bubblewrap begins, so that nothing inside is
    root outside, and the limit on processes counts.
    """

    counts_alone = tuple(map(int, os.uname().release.split(".")[:2])) >= (5, 14)  # per user namespace since
    limits_inside = False
    overhead_bytes = 0

    def __init__(self, bwrap: str, filter_: bytes, toolchains: Sequence[str], disable_userns: bool) -> None:
        self._bwrap = bwrap
        self._filter = filter_
        self._toolchains = tuple(toolchains)
        self._disable_userns = disable_userns
        self._fds: list[int] = []

    def prepare(self, job: Job) -> Prepared:
        argv = [self._bwrap, *self._namespaces(), "--clearenv"]
        for name, value in environment(BOX, self._toolchains).items():
            argv += ["--setenv", name, value]
        argv += self._root()
        for folder, size in ((BOX, job.file_bytes), ("/tmp", job.file_bytes)):
            argv += ["--perms", "0700", "--size", str(size), "--tmpfs", folder]
        for name, content in job.files.items():
            argv += ["--perms", "0755", "--file", str(self._open(name, content)), f"{BOX}/{name}"]
        argv += ["--remount-ro", "/", "--chdir", BOX]
        argv += ["--seccomp", str(self._open("filter", self._filter)), "--", *started(job)]
        return Prepared(argv=tuple(argv), environment={}, folder="/", inherited=tuple(self._fds))

    def confine(self) -> None:
        """bubblewrap does it."""

    def overfull(self) -> bool:
        """Never: the kernel refuses to write more than the tmpfs holds."""
        return False

    def finish(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def _namespaces(self) -> list[str]:
        flags = ["user", "pid", "net", "ipc", "uts", "cgroup-try"]
        unshared = [f"--unshare-{flag}" for flag in flags]
        if self._disable_userns:
            unshared.append("--disable-userns")
        return [*unshared, "--die-with-parent", "--new-session", "--hostname", "box"]

    def _root(self) -> list[str]:
        argv: list[str] = []
        for path in SYSTEM:
            if os.path.islink(path):
                argv += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                argv += ["--ro-bind", path, path]
        for path in (*SETTINGS, *glob.glob("/etc/java-*"), *self._toolchains):
            argv += ["--ro-bind-try", path, path]
        argv += ["--proc", "/proc", "--dev", "/dev"]
        argv += ["--size", str(_SHARED_MEMORY_BYTES), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
        return argv

    def _open(self, name: str, content: bytes) -> int:
        self._fds.append(memory_file(name, content))
        return self._fds[-1]
