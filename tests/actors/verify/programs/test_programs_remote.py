"""A sandbox behind HTTP, against a server that speaks SandboxFusion's protocol and runs what it is sent."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from treadle.actors.verify.programs import remote
from treadle.actors.verify.programs.records import MIB, Command, Limits, Reason, SandboxError
from treadle.actors.verify.programs.remote import RemoteSandbox
from treadle.actors.verify.programs.tiers import Choice, open_local
from treadle.actors.verify.programs.verifier import CodeVerifier
from treadle.platform.errors import ConfigError

pytestmark = pytest.mark.processes

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """The URL of a server that answers every request so."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer(self, body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def reply(handler: BaseHTTPRequestHandler, body: Any, status: int = 200) -> None:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    handler.wfile.write(text)


def finished(stdout: str = "", code: int = 0, status: str = "Finished") -> dict[str, Any]:
    run = {"status": status, "return_code": code, "stdout": stdout, "stderr": "", "execution_time": 0.1}
    return {"status": "Success" if code == 0 else "Failed", "message": "", "run_result": run}


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """`/run_code` by the local sandbox, for those who know the token."""
    local = open_local(Choice())

    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if handler.path != "/api/run_code" or handler.headers["Authorization"] != "Bearer open sesame":
            return reply(handler, {"detail": "no"}, 401)
        files = {name: base64.b64decode(content) for name, content in body["files"].items()}
        ended = local.run(
            Command(
                argv=("/bin/bash", "the script.sh"),
                stdin=body["stdin"].encode(),
                files={**files, "the script.sh": body["code"].encode()},
                limits=Limits(
                    wall_s=body["run_timeout"],
                    cpu_s=60.0,
                    memory_bytes=body["memory_limit_MB"] * MIB,
                    output_bytes=16 * MIB,
                    processes=160,
                ),
            )
        )
        assert body["language"] == "bash"
        late = ended.reason is Reason.WALL_TIME
        code = ended.exit_code if ended.signal is None else -ended.signal
        run = {
            "status": "TimeLimitExceeded" if late else "Finished",
            "return_code": code if ended.reason is Reason.EXITED else None if late else 137,
            "stdout": ended.stdout.decode(errors="replace"),
            "stderr": ended.stderr.decode(errors="replace"),
        }
        return reply(
            handler, {"status": "Success" if code == 0 else "Failed", "message": "", "run_result": run}
        )

    with serving(answer) as url:
        yield f"{url}/api"
    local.close()


@pytest.fixture
def sandbox(service: str, monkeypatch: pytest.MonkeyPatch) -> RemoteSandbox:
    monkeypatch.setenv("TREADLE_TEST_TOKEN", "open sesame")
    return RemoteSandbox(service, "TREADLE_TEST_TOKEN")


def test_it_gives_back_output_and_status(sandbox: RemoteSandbox) -> None:
    script = "cat; cat 'a file'; echo e >&2; exit 7"
    ended = sandbox.run(Command(argv=("bash", "-c", script), stdin="ü\n".encode(), files={"a file": b"x\n"}))
    assert (ended.stdout, ended.stderr) == ("ü\nx\n".encode(), b"e\n")
    assert (ended.reason, ended.exit_code, ended.signal) == (Reason.EXITED, 7, None)


def test_it_tells_signal_and_limits_apart(sandbox: RemoteSandbox) -> None:
    assert sandbox.run(Command(argv=("bash", "-c", "kill -SEGV $$"))).signal == 11
    late = sandbox.run(Command(argv=("sleep", "9"), limits=Limits(wall_s=0.3)))
    assert late.reason is Reason.WALL_TIME
    flood = sandbox.run(Command(argv=("head", "-c", "5000", "/dev/zero"), limits=Limits(output_bytes=4000)))
    assert (flood.reason, len(flood.stdout)) == (Reason.OUTPUT_LIMIT, 4000)


def test_the_verifier_works_through_it(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_TEST_TOKEN", "open sesame")
    verifier = CodeVerifier(
        sandbox="remote", remote_url=service, remote_token_env="TREADLE_TEST_TOKEN", languages="python,c"
    )
    assert verifier.version.startswith("1 (remote 127.0.0.1; python 3.")
    calls: dict[str, Any] = {"tests": [{"call": {"function": "f", "args": [2]}, "returns": 4}]}
    for code, expected in (("def f(x): return x * x", 1.0), ("def f(x): return x * 3", 0.0)):
        assert verifier.score(f"```python\n{code}\n```", calls) == (("accuracy", expected),)
    inputs: dict[str, Any] = {"language": "c", "tests": [{"stdin": "", "stdout": "5"}]}
    for number, expected in ((5, 1.0), (6, 0.0)):
        code = f'#include <stdio.h>\nint main(void) {{ puts("{number}"); }}'
        assert verifier.score(f"```c\n{code}\n```", inputs) == (("accuracy", expected),)


def dripping(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """A byte now and then, so that no single read takes long."""
    try:
        for _ in range(100):
            handler.wfile.write(b"H")
            time.sleep(0.1)
    except OSError:
        return


def silent(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    time.sleep(4)


@pytest.mark.parametrize("answer", [dripping, silent])
def test_the_deadline_holds_against_a_service_that_stalls(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_GRACE_S", 0.5)
    with serving(answer) as url:
        began_s = time.monotonic()
        with pytest.raises(SandboxError, match="Error"):
            RemoteSandbox(url).run(Command(argv=("true",), limits=Limits(wall_s=0.5)))
        assert time.monotonic() - began_s < 1.5


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"no json", 200, "not a JSON object"),
        ([1], 200, "not a JSON object"),
        ({}, 200, "None"),
        ({"status": "SandboxError", "message": "out of order"}, 200, "out of order"),
        ({"status": "Success", "run_result": None}, 200, "Success"),
        ({"status": "Success", "run_result": {"return_code": "x"}}, 200, "return code"),
        ({"detail": "no"}, 401, "401"),
        (finished(), 500, "500"),
        (b"[" * 100_000, 200, "not a JSON object"),
    ],
)
def test_an_answer_that_is_none_is_the_sandboxs_fault(body: Any, status: int, says: str) -> None:
    answer: Answer = lambda handler, _: reply(handler, body, status)  # noqa: E731
    with serving(answer) as url, pytest.raises(SandboxError, match=says):
        RemoteSandbox(url).run(Command(argv=("true",)))


def test_an_answer_without_end_is_a_flood() -> None:
    with serving(lambda handler, _: reply(handler, finished("x" * 30 * MIB))) as url:
        ended = RemoteSandbox(url).run(Command(argv=("true",), limits=Limits(output_bytes=1000)))
    assert ended.reason is Reason.OUTPUT_LIMIT
    assert ended.stdout == b""


def test_nobody_there_is_the_sandboxs_fault() -> None:
    with serving(lambda *_: None) as url:
        pass
    with pytest.raises(SandboxError, match="ConnectionRefusedError"):
        RemoteSandbox(url).run(Command(argv=("true",)))


@pytest.mark.parametrize("url", ["", "localhost:80", "ftp://x", "http://", "file:///etc/passwd"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="remote_url"):
        CodeVerifier(sandbox="remote", remote_url=url)


def test_a_token_that_is_not_there_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match="TREADLE_TEST_NO_TOKEN"):
        RemoteSandbox("http://localhost", "TREADLE_TEST_NO_TOKEN")
