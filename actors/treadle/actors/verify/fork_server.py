"""The process that verifier processes are forked from: `python -m treadle.actors.verify.fork_server PARENT_PID`.

It builds verifiers once; a process that replaces a killed one then costs a fork, and not a second of importing sympy.
It judges nothing, starts no thread, and answers one request at a time: a packet of JSON each way, and for a fork the
new process's descriptors with it. An ended process stays until it is asked for, so that its pid stays its own.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import socket
import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, cast

from treadle.actors.verify.child import Judge, describe, limit_resources
from treadle.actors.verify.composite import CompositeVerifier, ScoringSpec, make_composite
from treadle.actors.verify.frames import MAX_PACKET_BYTES, Channel, Progress
from treadle.platform.processes import die_with, name_process

if TYPE_CHECKING:
    from treadle.platform.records import Json


def main() -> None:
    die_with(int(sys.argv[1]))
    name_process("verifier-forks")
    requests = socket.socket(fileno=os.dup(0))
    _point(0, os.open(os.devnull, os.O_RDONLY))
    hello = requests.recv(MAX_PACKET_BYTES)
    if hello:
        ForkServer(requests, json.loads(hello)).serve()


class ForkServer:
    """Holds built verifiers, and nothing that a fork could trip over."""

    def __init__(self, requests: socket.socket, hello: dict[str, Json]) -> None:
        self._requests = requests
        self._memory_bytes = cast(int, hello["memory_bytes"])
        self._spec = _read_spec(cast("dict[str, Json]", hello["spec"]))
        self._verifiers: dict[str, CompositeVerifier] = {}

    def serve(self) -> None:
        """Until the pool closes its end."""
        while True:
            packet, fds, _, _ = socket.recv_fds(self._requests, MAX_PACKET_BYTES, 3)
            if not packet:
                return
            asked = json.loads(packet)
            if "load" in asked:
                answer = self._load(asked["load"])
            elif "reap" in asked:
                answer = _reap(asked["reap"])
            else:
                answer = self._fork(fds)
            self._requests.send(json.dumps(answer).encode())

    def _load(self, name: str) -> dict[str, Json]:
        """Builds a verifier for all processes to come. One that cannot be built is each process's own trouble."""
        try:
            self._verifiers[name] = make_composite(name, self._spec)
        except Exception as error:  # noqa: BLE001  whatever a factory raises; the pool reports it when it is used
            return {"error": describe(error)}
        gc.collect()
        gc.freeze()  # the collector writes into objects, and a written page is copied in every process
        return {"loaded": name}

    def _fork(self, fds: list[int]) -> dict[str, Json]:
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            return {"error": f"no process could be started: {error}"}
        finally:
            if os.getpid() == server:
                for fd in fds:
                    os.close(fd)
        if pid == 0:
            self._become_verifier(server, *fds)
        with suppress(PermissionError, ProcessLookupError):  # it has done so itself, or ended
            os.setpgid(pid, pid)  # here too: the pool may kill the group before the process has run at all
        return {"pid": pid}

    def _become_verifier(self, server: int, channel: int, progress: int, output: int) -> NoReturn:
        status = 1
        try:
            self._requests.close()
            os.setpgid(0, 0)
            _point(1, os.dup(output))
            _point(2, output)
            die_with(server)
            name_process("verifier")
            faulthandler.enable()
            limit_resources(self._memory_bytes)
            Judge(Channel(channel), Progress(progress), self._spec, self._verifiers).serve()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:  # noqa: BLE001  nothing may return into the server's loop
            traceback.print_exc()
        finally:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(status)


def _reap(pid: int) -> dict[str, Json]:
    """`status` is as in `subprocess`: negative for a signal, null while the process runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return {"status": os.waitstatus_to_exitcode(status) if found else None}


def _point(standard: int, fd: int) -> None:
    """A verifier that reads or prints meets these descriptors, and never a socket."""
    os.dup2(fd, standard)
    os.close(fd)


def _read_spec(spec: dict[str, Json]) -> ScoringSpec:
    return ScoringSpec(
        parts=cast("dict[str, float]", spec["parts"]),
        eos=cast(str, spec["eos"]),
        think_opened=cast(bool, spec["think_opened"]),
        custom=cast("dict[str, str]", spec["custom"]),
        options=cast("dict[str, dict[str, object]]", spec["options"]),
    )


if __name__ == "__main__":
    main()
