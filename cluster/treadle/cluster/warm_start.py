"""Role processes in tenths of a second: forked from one that has imported what they all need.

A process of a role imports torch, transformers and DeepSpeed: four to seven CPU seconds, which on two cores and with
five role processes are most of a small run's start, and of every replacement of a dead one. Ray starts its workers
with the interpreter of the runtime environment (`py_executable`); here that is `worker_shim`, which hands the worker's
command, environment and descriptors to the template (`template`), and the template forks. Where no template answers,
the worker starts on its own, as it would have anyway.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from treadle.cluster import worker_shim
from treadle.platform.records import RoleSpec

SOCKET, LOG = "template.sock", "template.log"


def pays(specs: Sequence[RoleSpec]) -> bool:
    """Whether processes may be forked. Not where a role has a GPU: libraries ask the driver for devices when they are
    imported, and CUDA does not survive a fork."""
    return bool(specs) and not any(spec.gpus for spec in specs)


@contextlib.contextmanager
def template(folder: Path, preload: Sequence[str]) -> Iterator[str]:
    """A template process that listens in `folder`, and the `py_executable` whose workers it forks.

    `preload` names what it imports: modules, or functions as "module:function" that are called; none may import ray,
    which reads its environment when it is imported. The process ends with the block or this process.
    """
    address = folder / SOCKET
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening, open(folder / LOG, "wb") as log:
        listening.bind(str(address))
        listening.listen(128)  # before the process imports, and before Ray starts: workers wait in the queue
        process = subprocess.Popen(
            [sys.executable, "-m", "treadle.cluster.template", str(os.getpid()), *preload],
            stdin=listening.fileno(),
            stdout=log,
            stderr=log,
            # BLAS starts threads when it is imported, and CUDA looks at its devices: neither survives a fork. Roles set
            # their threads themselves.
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # its own, so that all that it has forked can be told
        )
    try:
        yield shlex.join(
            [sys.executable, "-I", "-S", str(Path(worker_shim.__file__).resolve()), str(address)]
        )
    finally:
        process.kill()
        _end_session(process.pid)
        process.wait()
        address.unlink(missing_ok=True)


def _end_session(leader: int) -> None:
    """Ends the workers that are left of a session. Ray is gone by now, and one that was only just forked may look for
    it for another minute."""
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == leader != pid:
                os.kill(pid, signal.SIGKILL)
