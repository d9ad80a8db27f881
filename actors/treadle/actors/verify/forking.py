"""The fork server, seen from the pool.

The standard library has one too (`multiprocessing.forkserver`), but it hands its own environment on, knows one server
per program, and collects ended processes itself, so that a pid may belong to somebody else by the time it is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from time import monotonic
from typing import IO, TYPE_CHECKING, Any

from treadle.actors.verify.composite import ScoringSpec
from treadle.actors.verify.frames import MAX_PACKET_BYTES
from treadle.actors.verify.registry import FORKABLE
from treadle.platform.failpoints import ENV, ENV_FILE, ENV_ONCE

if TYPE_CHECKING:
    from treadle.platform.records import Json

REAP_S = 2.0
"""How long an ended process is waited for: longer, and it hangs in a call that nothing interrupts."""
_POLL_S = 0.002
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR", "VIRTUAL_ENV")


class ChildError(Exception):
    """A process that does not start, or cannot build a verifier. `fatal`: the process is gone."""

    def __init__(self, detail: str, fatal: bool) -> None:
        super().__init__(detail, fatal)
        self.detail = detail
        self.fatal = fatal


class Forked:
    """A process of a fork server. `status` is None until `reap` has found it ended, then as in `subprocess`."""

    def __init__(self, server: _Server, pid: int) -> None:
        self._server = server
        self.pid = pid
        self.status: int | None = None

    def kill(self) -> None:
        """Ends the process and all it started; does not wait. Call it before `reap`."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def reap(self) -> None:
        """Collects the ended process; gives up after `REAP_S`."""
        until_s = monotonic() + REAP_S
        while self.status is None and monotonic() < until_s:
            try:
                answer = await self._server.ask({"reap": self.pid})
            except ChildError:
                return  # it went with its server
            self.status = answer["status"]
            if self.status is None:
                await asyncio.sleep(_POLL_S)


class ForkServer:
    """Starts processes that have their verifiers built.

    consumes: names of verifiers, descriptors of new processes; waits for: the answer of its own process, until
    `startup_deadline_s`; unblocked by: the answer, the process's end or the clock; produces: processes. Its process is
    started by the first request, and again after its death, which takes the verifier processes along.
    """

    def __init__(
        self,
        spec: ScoringSpec,
        memory_bytes: int,
        startup_deadline_s: float,
        pass_environment: Sequence[str] = (),
    ) -> None:
        self._hello: dict[str, Json] = {"memory_bytes": memory_bytes, "spec": asdict(spec)}
        self._deadline_s = startup_deadline_s
        self._pass_environment = tuple(pass_environment)
        self._starting = asyncio.Lock()
        self._server: _Server | None = None
        self._wanted: dict[str, None] = {}

    async def load(self, name: str) -> None:
        """From now on processes have built this verifier, if it is one that survives a fork and can be built."""
        if name not in FORKABLE or name in self._wanted:
            return
        server = await self._ready()
        self._wanted[name] = None
        with suppress(ChildError):  # a process that is asked for this verifier says why
            await server.ask({"load": name})

    async def fork(self, channel: int, progress: int, output: int) -> Forked:
        """A new process that talks on the socket `channel`. The descriptors stay the caller's. Raises `ChildError`."""
        server = await self._ready()
        forking = asyncio.ensure_future(server.ask({"fork": True}, (channel, progress, output)))
        try:
            answer = await asyncio.shield(forking)
        except asyncio.CancelledError:
            await _abandon(server, forking)
            raise
        if "error" in answer:
            raise ChildError(answer["error"], fatal=True)
        return Forked(server, answer["pid"])

    async def close(self) -> None:
        """Ends the process, and with it those that it forked."""
        async with self._starting:
            server, self._server = self._server, None
            if server is not None:
                await server.close()

    async def _ready(self) -> _Server:
        async with self._starting:
            if self._server is not None and self._server.alive:
                return self._server
            if self._server is not None:
                await self._server.close()
            self._server = _Server(self._hello, self._deadline_s, minimal_environment(self._pass_environment))
            for name in self._wanted:
                with suppress(ChildError):
                    await self._server.ask({"load": name})
            return self._server


async def _abandon(server: _Server, forking: asyncio.Future[dict[str, Any]]) -> None:
    """Nobody wants the process any more that is just being forked."""
    with suppress(ChildError):
        answer = await forking
        if "pid" in answer:
            forked = Forked(server, answer["pid"])
            forked.kill()
            await forked.reap()


class _Server:
    """One incarnation of the server's process. Raises `ChildError` where it cannot be started."""

    def __init__(self, hello: dict[str, Json], deadline_s: float, environment: dict[str, str]) -> None:
        self._deadline_s = deadline_s
        self._asking = asyncio.Lock()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  closed with the server
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        with theirs:
            try:
                self._popen = _spawn(theirs, self._output, environment)
                self._socket.send(json.dumps(hello).encode())
            except OSError as error:
                self._socket.close()
                self._output.close()
                raise ChildError(f"no process could be started: {error}", fatal=True) from error
        self.alive = True

    async def ask(self, message: dict[str, Json], fds: Sequence[int] = ()) -> dict[str, Any]:
        """Raises `ChildError` when the server is gone, or does not answer and is ended."""
        # Shielded: an answer that nobody awaits would be taken for the next one's.
        exchange = asyncio.ensure_future(self._exchange(json.dumps(message).encode(), fds))
        exchange.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(exchange)

    async def close(self) -> None:
        """Ends the process, and waits until it is gone."""
        self.alive = False
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        until_s = monotonic() + REAP_S
        while self._popen.poll() is None and monotonic() < until_s:
            await asyncio.sleep(_POLL_S)
        async with self._asking:  # whoever still waits for an answer has been told
            self._socket.close()
            self._output.close()

    async def _exchange(self, packet: bytes, fds: Sequence[int]) -> dict[str, Any]:
        async with self._asking:
            if not self.alive:
                raise ChildError("the fork server has ended", fatal=True)
            try:
                async with asyncio.timeout(self._deadline_s):
                    socket.send_fds(self._socket, [packet], fds)
                    answer = await asyncio.get_running_loop().sock_recv(self._socket, MAX_PACKET_BYTES)
                if answer:
                    said: dict[str, Any] = json.loads(answer)
                    return said
                detail = f"the fork server has ended: {last_line(self._output)}"
            except TimeoutError:
                detail = f"the fork server did not answer within {self._deadline_s:g} s"
            except OSError as error:
                detail = f"the fork server has ended: {last_line(self._output) or error}"
            self.alive = False
            with suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)
            raise ChildError(detail, fatal=True)


def _spawn(socket_: socket.socket, output: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """No `preexec_fn`: it would fork the whole actor instead of using vfork. The process limits itself."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "treadle.actors.verify.fork_server", str(os.getpid())],
        stdin=socket_.fileno(),
        stdout=output,
        stderr=output,
        start_new_session=True,
        cwd="/",
        env=environment,
    )


def minimal_environment(extra: Sequence[str] = ()) -> dict[str, str]:
    """No credentials but those named: a completion may try to have them printed. The import path is this process's
    own."""
    kept = {name: os.environ[name] for name in (*_KEPT_VARIABLES, *extra) if name in os.environ}
    for name in (ENV, ENV_FILE, ENV_ONCE):
        if value := os.environ.get(name):
            kept[name] = value if name == ENV else os.path.abspath(value)
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    return kept | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}


def last_line(output: IO[bytes]) -> str:
    """The last line that a process printed, cut to 200 characters."""
    size = os.fstat(output.fileno()).st_size
    # pread: the offset of this file is shared with the process
    text = os.pread(output.fileno(), 2000, max(0, size - 2000)).decode(errors="replace")
    return (text.strip().splitlines() or [""])[-1][-200:]
