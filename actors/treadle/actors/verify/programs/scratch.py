"""The tiers without namespaces: a folder of the host for each job, and what a process gives up by itself."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace

from treadle.actors.verify.programs.confinement import (
    FOLDER_PREFIX,
    SETTINGS,
    SYSTEM,
    Job,
    Prepared,
    environment,
    started,
)
from treadle.actors.verify.programs.landlock import DEVICE, READ, Ruleset

MAX_ENTRIES = 4096
"""Files and folders a job may make; more of them count as too many bytes."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_PROC = ("/proc/cpuinfo", "/proc/meminfo", "/proc/stat")
_SET_SECCOMP, _FILTER_MODE = 22, 2
_REMOVE_S = 20.0


class Scratch:
    """Implements `Confinement` by nothing but limits and a folder. Labelled so: it holds mistakes, no malice."""

    counts_alone = False
    limits_inside = False
    overhead_bytes = 0

    def __init__(self, toolchains: Sequence[str]) -> None:
        self._toolchains = tuple(toolchains)
        self._folder = ""
        self._file_bytes = 0

    def prepare(self, job: Job) -> Prepared:
        self._folder = tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-")
        self._file_bytes = job.file_bytes
        for name, content in job.files.items():
            path = f"{self._folder}/{name}"
            with open(path, "wb") as file:
                file.write(content)
            os.chmod(path, 0o755)
            if job.owner is not None:
                os.chown(path, job.owner, job.owner)
        if job.owner is not None:
            os.chown(self._folder, job.owner, job.owner)
        return Prepared(
            argv=started(job),
            environment=environment(self._folder, self._toolchains),
            folder=self._folder,
        )

    def confine(self) -> None:
        """Nothing more than the limits that every tier has."""

    def overfull(self) -> bool:
        """Whether the folder holds more bytes or entries than it may. Runs beside the job, which may move
        things about meanwhile."""
        size = entries = 0
        folders = [self._folder]
        while folders:
            try:
                with os.scandir(folders.pop()) as found:
                    for entry in found:
                        entries += 1
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
                        if size > self._file_bytes or entries > MAX_ENTRIES:
                            return True
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
            except FileNotFoundError:
                continue
            except PermissionError:  # its owner has locked it, and cannot write there either
                continue
            except OSError:  # a path too long to follow
                return True
        return False

    def finish(self) -> None:
        folder, self._folder = self._folder, ""
        if not folder:
            return
        try:
            shutil.rmtree(folder)
        except (OSError, RecursionError):  # thousands of folders in one another, or locked ones
            for command in (["rm", "-rf"], ["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
                if os.path.lexists(folder):
                    argv = [*command, "--", folder]
                    subprocess.run(argv, check=False, capture_output=True, timeout=_REMOVE_S)


class LandlockScratch(Scratch):
    """Implements `Confinement`: Landlock for files, TCP and signals, seccomp for every socket and for leaving
    the process group, so that one signal reaches all there is."""

    def __init__(self, filter_: bytes, toolchains: Sequence[str]) -> None:
        super().__init__(toolchains)
        self._filter = filter_
        self._rules: Ruleset | None = None

    def prepare(self, job: Job) -> Prepared:
        prepared = super().prepare(job)
        self._rules = Ruleset()
        self._rules.allow((*SYSTEM, *SETTINGS, *glob.glob("/etc/java-*"), *self._toolchains, *_PROC), READ)
        self._rules.allow(_DEVICES, DEVICE)
        self._rules.allow((self._folder,), self._rules.all)
        return replace(prepared, private=(self._rules.fd,))

    def confine(self) -> None:
        assert self._rules is not None
        self._rules.allow((f"/proc/{os.getpid()}",), READ)
        self._rules.restrict()
        set_filter(self._filter)

    def finish(self) -> None:
        if self._rules is not None:
            self._rules.close()
            self._rules = None
        super().finish()


def set_filter(bpf: bytes) -> None:
    """Sets a seccomp filter for this process and all that it starts. Raises `OSError`."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    program = Program(len(bpf) // 8, bpf)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_SECCOMP, _FILTER_MODE, ctypes.byref(program), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
