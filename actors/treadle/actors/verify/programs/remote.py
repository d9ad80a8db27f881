"""Commands run by a sandbox service: SandboxFusion's `POST /run_code`, and what speaks it."""

from __future__ import annotations

import base64
import http.client
import json
import math
import os
import shlex
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from treadle.actors.verify.programs.records import MIB, Command, Ended, Reason, SandboxError
from treadle.platform.errors import ConfigError

if TYPE_CHECKING:
    from treadle.platform.records import Json

_GRACE_S = 5.0
"""What the way there and back, and a service's queue, may add to a command's time."""
_ENVELOPE_BYTES = MIB
_ESCAPED_BYTES = 6
"""Most bytes that JSON takes for one byte of output (`\\u0000`)."""


class RemoteSandbox:
    """Implements `Sandbox` over HTTP. What isolates is the service's; what it says of itself is not checked.

    A command becomes a shell script (`language: bash`) with its files beside it, so a service needs the
    toolchains on its `PATH`. Output is text: bytes that are not UTF-8 are as the service replaces them.
    `cpu_s` is not reported and equals the wall time. Raises `ConfigError` for an unusable URL or a token
    that is not in the environment.
    """

    def __init__(self, url: str, token_env: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"verify.options.code.remote_url={url!r} is no URL of a sandbox service.",
                "Give http(s)://host:port, without /run_code.",
            )
        if token_env and not os.environ.get(token_env):
            raise ConfigError(
                f"verify.options.code.remote_token_env={token_env}: the verifier's process has no such variable.",
                f"Set it where the run starts, and verify.pass_environment=[{token_env}].",
            )
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/") + "/run_code"
        self._headers = {"Content-Type": "application/json"}
        if token_env:
            self._headers["Authorization"] = f"Bearer {os.environ[token_env]}"
        self.tier = f"remote {parts.hostname}"

    def run(self, command: Command) -> Ended:
        """See `Sandbox.run`. Holds the command's `wall_s` and a few seconds, whatever the service does."""
        began_s = time.monotonic()
        limits = command.limits
        answer = self._posted(
            {
                "language": "bash",
                "code": _script(command),
                "stdin": command.stdin.decode("utf-8", "surrogateescape"),
                "run_timeout": limits.wall_s,
                "compile_timeout": limits.wall_s,
                "memory_limit_MB": math.ceil(limits.memory_bytes / MIB),
                "files": {
                    name: base64.b64encode(content).decode() for name, content in command.files.items()
                },
                "fetch_files": [],
            },
            limits.wall_s + _GRACE_S,
            2 * _ESCAPED_BYTES * limits.output_bytes + _ENVELOPE_BYTES,
        )
        wall_s = time.monotonic() - began_s
        if answer is None:
            return _ended(Reason.OUTPUT_LIMIT, None, b"", b"", wall_s)
        return self._read(answer, limits.output_bytes, wall_s)

    def close(self) -> None:
        """Nothing is held between commands."""

    def _posted(self, body: dict[str, Json], deadline_s: float, max_bytes: int) -> dict[str, Any] | None:
        """The service's answer; None where it is longer than `max_bytes`.

        In a thread of its own: a socket's timeout is per read, and name resolution has none, so neither
        bounds the whole."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=deadline_s)
        outcome: list[bytes | Exception] = []
        text = json.dumps(body).encode("ascii")

        def talk() -> None:
            try:
                connection.request("POST", self._path, text, self._headers)
                response = connection.getresponse()
                if response.status != http.client.OK:
                    raise OSError(f"status {response.status} {response.reason}")
                outcome.append(response.read(max_bytes + 1))
            except (OSError, http.client.HTTPException, ValueError) as error:
                outcome.append(error)

        thread = threading.Thread(target=talk, name="sandbox-service", daemon=True)
        thread.start()
        thread.join(deadline_s)
        answer = outcome[0] if outcome else TimeoutError(f"no answer within {deadline_s} s")
        connection.close()
        if isinstance(answer, Exception):
            raise SandboxError(
                f"verify, sandbox {self.tier}: {type(answer).__name__}: {answer}."[:400],
                "Look at the service behind verify.options.code.remote_url.",
            ) from answer
        if len(answer) > max_bytes:
            return None
        try:
            return dict(json.loads(answer))
        except (ValueError, TypeError, RecursionError) as error:
            raise SandboxError(f"verify, sandbox {self.tier}: the answer is not a JSON object.") from error

    def _read(self, answer: dict[str, Any], output_bytes: int, wall_s: float) -> Ended:
        run = answer.get("run_result")
        if answer.get("status") not in ("Success", "Failed") or not isinstance(run, dict):
            raise SandboxError(
                f"verify, sandbox {self.tier}: {answer.get('status')}: {answer.get('message')}"[:400]
            )
        stdout, stderr = (
            str(run.get(name) or "").encode("utf-8", "surrogateescape") for name in ("stdout", "stderr")
        )
        if max(len(stdout), len(stderr)) > output_bytes:
            return _ended(Reason.OUTPUT_LIMIT, None, stdout[:output_bytes], stderr[:output_bytes], wall_s)
        if run.get("status") == "TimeLimitExceeded":
            return _ended(Reason.WALL_TIME, None, stdout, stderr, wall_s)
        code = run.get("return_code")
        if not isinstance(code, int):
            raise SandboxError(f"verify, sandbox {self.tier}: a run without a return code."[:400])
        return _ended(Reason.EXITED, code, stdout, stderr, wall_s)


def _script(command: Command) -> str:
    """The command as a shell script that limits itself; memory and time are also the service's to limit."""
    limits = command.limits
    lines = [
        "ulimit -c 0",
        f"ulimit -t {max(1, math.ceil(limits.cpu_s))}",
        f"ulimit -f {math.ceil(limits.file_bytes / 1024)}",
        f"ulimit -n {limits.open_files}",
    ]
    if limits.address_space_bytes:
        lines.append(f"ulimit -v {limits.address_space_bytes // 1024}")
    if command.files:
        lines.append(f"chmod 755 -- {shlex.join(command.files)}")
    return "\n".join([*lines, f"exec {shlex.join(command.argv)}", ""])


def _ended(reason: Reason, code: int | None, stdout: bytes, stderr: bytes, wall_s: float) -> Ended:
    """A return code below 0 or above 128 is a signal."""
    number = 0 if code is None else -code if code < 0 else code - 128 if code > 128 else 0
    return Ended(
        reason=reason,
        exit_code=None if number else code,
        signal=number or None,
        stdout=stdout,
        stderr=stderr,
        wall_s=wall_s,
        cpu_s=wall_s,
    )
