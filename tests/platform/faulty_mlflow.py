"""A real MLflow server, and a proxy before it that plays its outages."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from enum import Enum
from pathlib import Path


class Fault(Enum):
    """What clients meet instead of the server."""

    NONE = "none"
    STOPPED = "connection refused"
    SLOW = "answers 30 s late"
    ERROR = "500"
    UNAUTHORIZED = "401"
    GATEWAY = "400 of a gateway"


_ANSWERS = {
    Fault.ERROR: "500 Internal Server Error",
    Fault.UNAUTHORIZED: "401 Unauthorized",
    Fault.GATEWAY: "400 Bad Request",
}
LATE_S = 30.0


class FaultyMlflow:
    """The proxy, in a thread of its own. A change of `fault` breaks the connections there are.

    A late answer is late after the server has taken the request: who gives up and sends again sends twice.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._loop = asyncio.new_event_loop()
        self._fault = Fault.NONE
        self._listening: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.port = free_port()
        self.answered = dict.fromkeys(Fault, 0)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.set(Fault.NONE)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def set(self, fault: Fault) -> None:
        """From now on clients meet this."""
        asyncio.run_coroutine_threadsafe(self._set(fault), self._loop).result(10)

    def close(self) -> None:
        self.set(Fault.STOPPED)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _set(self, fault: Fault) -> None:
        self._fault = fault
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        if fault is Fault.STOPPED and self._listening is not None:
            self._listening.close()
            self._listening = None
        if fault is not Fault.STOPPED and self._listening is None:
            self._listening = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._serve(reader, writer)
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._fault in _ANSWERS:
            await _request(reader)
            page = b"<html>not now</html>"
            head = f"HTTP/1.1 {_ANSWERS[self._fault]}\r\nContent-Length: {len(page)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + page)
            await writer.drain()
            self.answered[self._fault] += 1
            return
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        try:
            late_s = LATE_S if self._fault is Fault.SLOW else 0.0
            await asyncio.gather(
                self._pass(reader, inner_writer, 0.0), self._pass(inner_reader, writer, late_s)
            )
        finally:
            inner_writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, late_s: float) -> None:
        while data := await reader.read(65536):
            if late_s:
                self.answered[Fault.SLOW] += 1
            await asyncio.sleep(late_s)
            writer.write(data)
            await writer.drain()
        writer.close()


async def _request(reader: asyncio.StreamReader) -> None:
    """Reads a request to its end: one that is answered before would see its connection reset instead."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = next(
        (line.split(":")[1] for line in head.splitlines() if line.startswith("content-length:")), "0"
    )
    await reader.readexactly(int(length))


@contextlib.contextmanager
def faulty_mlflow(folder: Path, niceness: int = 0) -> Iterator[FaultyMlflow]:
    """A server in `folder` behind a proxy."""
    port = free_port()
    with mlflow_server(folder, port, niceness):
        proxy = FaultyMlflow(port)
        try:
            yield proxy
        finally:
            proxy.close()


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int, niceness: int = 0) -> Iterator[str]:
    """A real tracking server, ended with its worker processes."""
    log = (folder / "server.log").open("ab")
    command = (
        f"nice -n {niceness} {sys.executable} -P -m mlflow server --host 127.0.0.1 --port {port} --workers 1 "
        f"--backend-store-uri sqlite:///{folder / 'server.db'} --default-artifact-root {folder / 'artifacts'}"
    )
    process = subprocess.Popen(
        command.split(),
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=log,
        stderr=log,
        start_new_session=True,
        cwd=folder,
    )
    uri = f"http://127.0.0.1:{port}"
    try:
        _await_health(uri, process)
        yield uri
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        log.close()


def _await_health(uri: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise AssertionError("the server did not come up")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
