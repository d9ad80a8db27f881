"""The sandboxes of this machine: commands handed to a launcher, their output read up to its limit."""

from __future__ import annotations

import glob
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from treadle.actors.verify.programs import control
from treadle.actors.verify.programs.confinement import FOLDER_PREFIX
from treadle.actors.verify.programs.processes import END_S
from treadle.actors.verify.programs.records import Command, Ended, Reason, SandboxError

_GRACE_S = END_S + 15.0
"""A launcher that has not answered this long after a command's time is over has failed. Removing what a program left
behind takes a while: a second is enough for very many folders."""
_START_S = 30.0
_CHUNK_BYTES = 2**16
_MODULE = "treadle.actors.verify.programs.launcher"


class LocalSandbox:
    """Implements `Sandbox` on this machine, by a launcher that is started once and kept.

    `settings` and `filter_` are what the launcher's tier needs. Raises `SandboxError` when it does not start.
    """

    def __init__(self, tier: str, settings: Mapping[str, Any], filter_: bytes) -> None:
        self.tier = tier
        self._settings = dict(settings)
        self._filter = filter_
        self._lock = threading.Lock()
        self._launcher: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None

    def run(self, command: Command) -> Ended:
        """See `Sandbox.run`. Returns within the command's `wall_s` and the time its processes need to die."""
        with self._lock:
            try:
                return self._run(command)
            except (OSError, TimeoutError) as error:
                self._drop()
                raise SandboxError(
                    f"verify, sandbox {self.tier}: {type(error).__name__}: {error}."
                ) from error
            except SandboxError:
                raise
            except BaseException:  # interrupted in mid-conversation: what comes next would be misread
                self._drop()
                raise

    def close(self) -> None:
        with self._lock:
            self._drop()

    @property
    def launcher_pid(self) -> int | None:
        """The process beneath which every program of this sandbox lives; None before the first one."""
        return self._launcher.pid if self._launcher is not None else None

    def _run(self, command: Command) -> Ended:
        link = self._link or self._start()
        stdout, their_stdout = os.pipe()
        stderr, their_stderr = os.pipe()
        outputs = {stdout: bytearray(), stderr: bytearray()}
        try:
            try:
                header = {
                    "argv": command.argv,
                    "names": list(command.files),
                    "limits": asdict(command.limits),
                }
                blobs = [command.stdin, *command.files.values()]
                control.send(link, header, blobs, [their_stdout, their_stderr])
            finally:
                os.close(their_stdout)
                os.close(their_stderr)
            answer, flooded = _conversation(link, outputs, command)
        finally:
            os.close(stdout)
            os.close(stderr)
        return self._ended(answer, flooded, bytes(outputs[stdout]), bytes(outputs[stderr]))

    def _ended(self, answer: dict[str, Any], flooded: bool, stdout: bytes, stderr: bytes) -> Ended:
        if "error" in answer or "unstarted" in answer:
            told = " ".join((answer.get("error") or answer["unstarted"] or "").split())
            shown = " ".join(stderr.decode(errors="replace").split())
            raise SandboxError(
                f"verify, sandbox {self.tier}: a command could not be started: {told} {shown}"[:600]
            )
        reason = Reason.OUTPUT_LIMIT if flooded else Reason(answer["reason"])
        return Ended(
            reason=reason,
            exit_code=answer["exit"] if reason is Reason.EXITED else None,
            signal=answer["signal"] if reason is Reason.EXITED else None,
            stdout=stdout,
            stderr=stderr,
            wall_s=answer["wall_s"],
            cpu_s=answer["cpu_s"],
        )

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
        kept = {
            name: os.environ[name] for name in ("PATH", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ
        }
        try:
            self._launcher = subprocess.Popen(
                [sys.executable, "-S", "-P", "-m", _MODULE],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=None,
                start_new_session=True,  # it must outlive a signal to the judge's group, to clean up
                cwd="/",
                env={**kept, "PYTHONPATH": path, "LANG": "C.UTF-8"},
            )
        finally:
            theirs.close()
        self._link = ours
        ours.settimeout(_START_S)
        control.send(ours, self._settings, [self._filter])
        if control.receive(ours) is None:
            raise OSError("the launcher ended at its start")
        return ours

    def _drop(self) -> None:
        """Ends the launcher, which ends its programs first; kills it if it does not."""
        link, self._link = self._link, None
        launcher, self._launcher = self._launcher, None
        if link is not None:
            link.close()
        if launcher is not None:
            try:
                launcher.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
            for folder in glob.glob(f"{tempfile.gettempdir()}/{FOLDER_PREFIX}{launcher.pid}-*"):
                shutil.rmtree(folder, ignore_errors=True)  # of a launcher that was killed


def _conversation(
    link: socket.socket, outputs: dict[int, bytearray], command: Command
) -> tuple[dict[str, Any], bool]:
    """Reads both streams until the launcher answers; also says whether one was more than it may be.

    Raises `TimeoutError` when no answer comes, `SandboxError` when the launcher is gone.
    """
    limit = command.limits.output_bytes
    until_s = time.monotonic() + command.limits.wall_s + control.SETUP_S + _GRACE_S
    poll = select.poll()
    poll.register(link, select.POLLIN)
    for fd in outputs:
        os.set_blocking(fd, False)
        poll.register(fd, select.POLLIN)
    flooded = False
    while True:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"the launcher did not answer {control.SETUP_S + _GRACE_S:g} s after its time")
        ready = dict(poll.poll(1000 * left_s))
        for fd in outputs.keys() & ready.keys():
            if _read(fd, outputs[fd], limit):
                continue
            poll.unregister(fd)
            if len(outputs[fd]) > limit and not flooded:
                flooded = True
                control.send(link, control.KILL)
        if link.fileno() in ready:
            link.settimeout(max(left_s, 0.1))
            message = control.receive(link)
            if message is None:
                raise OSError("the launcher ended")
            for fd, output in outputs.items():
                while _read(fd, output, limit):
                    pass
                flooded |= len(output) > limit
                del output[limit:]
            return message[0], flooded


def _read(fd: int, output: bytearray, limit: int) -> bool:
    """Reads what is there; whether more may come. At most one byte over the limit is kept."""
    room = limit + 1 - len(output)
    if room <= 0:
        return False
    try:
        chunk = os.read(fd, min(room, _CHUNK_BYTES))
    except BlockingIOError:
        return False
    output += chunk
    return bool(chunk)
