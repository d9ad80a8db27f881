"""The process that workers are forked from: `python -m treadle.cluster.template PARENT_PID PRELOAD...`, its standard
input being the listening socket.

It imports, starts no thread, never imports ray, and then only forks. Its pages are shared with all workers until
somebody writes to them, so a worker is also smaller than one that imported by itself.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from treadle.cluster.worker_shim import READY
from treadle.platform.processes import die_with, name_process

_PATIENCE_S = 10.0
"""For a shim that has connected to say what it wants."""


def main() -> None:
    die_with(int(sys.argv[1]))
    name_process("template")
    begun = dict(os.environ)
    load(sys.argv[2:])
    added = {name: value for name, value in os.environ.items() if begun.get(name) != value}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended workers vanish; Ray hears of them by their sockets
    with socket.socket(fileno=os.dup(0)) as listening:
        request = next_worker(listening)
    become(request, added)


def load(preload: Sequence[str]) -> None:
    """Imports modules and calls functions ("module:function"). What fails here fails in the worker that needs it, with
    its reason."""
    for name in preload:
        module, _, function = name.partition(":")
        try:
            found = importlib.import_module(module)
            if function:
                getattr(found, function)()
        except Exception:  # noqa: BLE001  an optional library may be missing or broken in any way
            traceback.print_exc()
    if "ray" in sys.modules:
        sys.exit(
            f"treadle: one of {', '.join(preload)} imports ray: workers forked from here would not start"
        )
    gc.collect()
    gc.freeze()  # the collector writes into objects, and a written page is copied in every worker


def next_worker(listening: socket.socket) -> dict[str, Any]:
    """Forks for every request; returns it in the child, and in the template never."""
    while True:
        shim, _ = listening.accept()
        with shim:
            shim.settimeout(_PATIENCE_S)
            try:
                shim.sendall(READY)
                request, descriptors = _receive(shim)
            except OSError:
                continue  # it has given up and started by itself, or was killed
            if not request:
                continue
            pid = os.fork()
            if pid == 0:
                _adopt(descriptors)
                return request
            for descriptor in descriptors:
                os.close(descriptor)
            with suppress(OSError):
                shim.sendall(str(pid).encode())


def _receive(shim: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The request and the worker's standard descriptors; nothing where the shim has gone."""
    head, descriptors, _, _ = socket.recv_fds(shim, 4, 3)
    size, body = int.from_bytes(head, "big"), b""
    while len(body) < size and (part := shim.recv(size - len(body))):
        body += part
    if len(head) == 4 and len(body) == size and len(descriptors) == 3:
        request: dict[str, Any] = json.loads(body)
        return request, descriptors
    for descriptor in descriptors:
        os.close(descriptor)
    return {}, []


def _adopt(descriptors: Sequence[int]) -> None:
    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
        os.close(descriptor)


def become(request: dict[str, Any], added: dict[str, str]) -> None:
    """Turns this process into the worker: its surroundings, then its script. `added` are variables that imports have
    set; the worker's own win."""
    os.setpgid(0, 0)  # as Ray's own workers have: it ends a worker's whole group
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked_signals"])
    with suppress(PermissionError):  # only root may become nicer to itself
        os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(request["oom_score"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(added | request["environment"])
    for path in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if path and path not in sys.path:
            sys.path.insert(0, path)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # all workers would draw the same numbers otherwise
    sys.argv = request["command"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
