"""gVisor: programs on a kernel of their own, by `runsc` and an OCI bundle per job.

Not by `ray.experimental.sandbox`, which needs container images, mkfs.erofs 1.7 and a later runsc than Debian's,
to reach the same place; a verifier's root is the host's toolchains, read-only, as in the other tiers. Starting
a kernel takes ten times as long as a process, so this tier is for those who ask for it.
"""

from __future__ import annotations

import glob
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from treadle.actors.verify.programs.confinement import (
    FOLDER_PREFIX,
    SETTINGS,
    SYSTEM,
    Job,
    Prepared,
    environment,
)
from treadle.actors.verify.programs.records import BOX


class GVisor:
    """Implements `Confinement` without root: `runsc` builds its own user namespace. The sandbox has no
    network, the host's toolchains read-only, and tmpfs. Limits per process hold inside, by gVisor's kernel.

    Descriptors do not reach inside, so the mark is a file, which a program can erase: it then gets a failed
    verdict instead of its own."""

    counts_alone = True
    limits_inside = True
    overhead_bytes = 384 * 2**20

    def __init__(self, runsc: str, toolchains: Sequence[str]) -> None:
        self._runsc = runsc
        self._toolchains = tuple(toolchains)
        self._folder = ""

    def prepare(self, job: Job) -> Prepared:
        self._folder = tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-")
        for name in ("rootfs", "files", "state"):
            os.mkdir(f"{self._folder}/{name}")
        for name, content in job.files.items():
            with open(f"{self._folder}/files/{name}", "wb") as file:
                file.write(content)
        mark = f"{self._folder}/mark"
        with open(mark, "wb"), open(f"{self._folder}/config.json", "w") as config:
            json.dump(self._specification(job), config)
        self._root()
        for folder, folders, files in os.walk(self._folder):
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                if not os.path.islink(path):
                    os.chmod(path, 0o755)
                if job.owner is not None:
                    os.lchown(path, job.owner, job.owner)
        if job.owner is not None:
            os.chown(self._folder, job.owner, job.owner)
        flags = ("--rootless", "--network=none", "--ignore-cgroups", f"--root={self._folder}/state")
        identity = f"treadle-{secrets.token_hex(8)}"
        return Prepared(
            argv=(self._runsc, *flags, "run", f"--bundle={self._folder}", identity),
            environment={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": self._folder},
            folder="/",
            mark=mark,
        )

    def confine(self) -> None:
        """runsc does it."""

    def overfull(self) -> bool:
        """Never: nothing of the host can be written but a mark."""
        return False

    def finish(self) -> None:
        folder, self._folder = self._folder, ""
        if folder:
            shutil.rmtree(folder, ignore_errors=True)

    def _root(self) -> None:
        for path in SYSTEM:
            inside = f"{self._folder}/rootfs{path}"
            if os.path.islink(path):
                os.symlink(os.readlink(path), inside)
            elif os.path.isdir(path):
                os.mkdir(inside)

    def _specification(self, job: Job) -> dict[str, Any]:
        shared = [path for path in SYSTEM if os.path.isdir(path) and not os.path.islink(path)]
        shared += [
            path for path in (*SETTINGS, *glob.glob("/etc/java-*"), *self._toolchains) if os.path.exists(path)
        ]
        mounts = [_mount("proc", "/proc"), _mount("devtmpfs", "/dev")]
        mounts += [_mount("bind", path, path, "ro", "rbind") for path in shared]
        mounts += [_mount("tmpfs", path, "tmpfs", f"size={job.file_bytes}") for path in (BOX, "/tmp")]
        mounts += [
            _mount("bind", "/job/files", f"{self._folder}/files", "ro"),
            _mount("bind", "/job/mark", f"{self._folder}/mark", "rw"),
        ]
        script = 'cp -p /job/files/* . 2>/dev/null; printf . > /job/mark; exec "$@"'
        names = environment(BOX, self._toolchains)
        return {
            "ociVersion": "1.0.0",
            "hostname": "box",
            "root": {"path": "rootfs", "readonly": True},
            "mounts": mounts,
            "process": {
                "terminal": False,
                "user": {
                    "uid": 0,
                    "gid": 0,
                },  # of a namespace in which nothing else exists, without a capability
                "args": ["/bin/sh", "-c", script, "sh", *job.argv],
                "env": [f"{name}={value}" for name, value in names.items()],
                "cwd": BOX,
                "capabilities": {},
                "noNewPrivileges": True,
                "rlimits": _inside(job),
            },
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]},
        }


def _mount(kind: str, destination: str, source: str = "none", *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}


def _inside(job: Job) -> list[dict[str, Any]]:
    seconds = max(1, math.ceil(job.limits["cpu_s"]))
    limits = {
        "RLIMIT_CPU": (seconds, seconds + 1),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_FSIZE": (job.file_bytes, job.file_bytes),
        "RLIMIT_NOFILE": (int(job.limits["open_files"]),) * 2,
        "RLIMIT_NPROC": (job.processes, job.processes),
    }
    if space := int(job.limits["address_space_bytes"]):
        limits["RLIMIT_AS"] = (space, space)
    return [{"type": name, "soft": soft, "hard": hard} for name, (soft, hard) in limits.items()]
