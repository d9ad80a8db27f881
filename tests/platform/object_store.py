"""A real S3 protocol server for tests, which can be told to answer badly."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BUCKET = "treadle-test"
ERRORS = {
    "500": "InternalError",
    "503": "SlowDown",
    "403": "ExpiredToken",
    "404": "NoSuchKey",
}


class Faults:
    """In front of the server: answers the next requests for objects with the faults in `due`, or all of them with
    `always`. Only requests that `concern` says yes to (method, path) are counted and disturbed; with `whole_bucket` it
    is asked about listings and removals of many objects, too.

    "500", "503", "403" and "404" are errors as S3 words them. "cut" promises the whole body and ends half-way, "flip"
    sends it with one bit flipped, "slow" takes `stall_s` to send it. "stall" does nothing for `stall_s`. "reset" resets
    the connection; "lost" does so after the request was carried out.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.due: list[str] = []
        self.always = ""
        self.seen = 0
        self.stall_s = 3.0
        self.whole_bucket = False
        self.concern: Callable[[str, str], bool] = lambda method, path: True
        self._application = application

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        concerned = (self.whole_bucket or path.count("/") > 1) and self.concern(
            environ["REQUEST_METHOD"], path
        )
        self.seen += concerned
        fault = (self.due.pop(0) if self.due else self.always) if concerned else ""
        if fault == "cut":
            body = b"".join(self._application(environ, start_response))
            return [body[: len(body) // 2]]
        if fault == "flip":
            damaged = bytearray(b"".join(self._application(environ, start_response)))
            damaged[len(damaged) // 2] ^= 4
            return [bytes(damaged)]
        if fault == "slow":
            return _trickling(b"".join(self._application(environ, start_response)), self.stall_s / 20)
        if fault in ("reset", "lost"):
            if fault == "lost":
                list(self._application(environ, lambda *_: None))
            return _reset(environ, start_response)
        if fault == "stall":
            time.sleep(self.stall_s)
            return _reset(environ, start_response)
        if fault:
            return _refused(fault, environ, start_response)
        return self._application(environ, start_response)


def _trickling(body: bytes, pause_s: float) -> Iterator[bytes]:
    step = len(body) // 20 + 1
    for start in range(0, len(body), step):
        time.sleep(pause_s)
        yield body[start : start + step]


def _refused(fault: str, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    body = f"<Error><Code>{ERRORS[fault]}</Code><Message>on purpose</Message></Error>".encode()
    headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
    start_response(f"{fault} {ERRORS[fault]}", headers)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def _reset(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    connection = environ["werkzeug.socket"]
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    start_response("500 Reset", [("Content-Length", "0")])
    return []


@contextmanager
def s3_server(
    environ: pytest.MonkeyPatch, listener: socket.socket | None = None
) -> Iterator[tuple[str, Faults]]:
    """Starts moto's server and points the environment at it. Yields the URL of a bucket, and the faults. What the
    bucket holds is the process's: another server in it finds what this one was given. `listener` listens already."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_: object) -> None: ...

    faults = Faults(DomainDispatcherApplication(create_backend_app))
    listening = listener or socket.create_server(("127.0.0.1", 0), backlog=128)
    host, port = listening.getsockname()
    server = make_server(host, port, faults, threaded=True, request_handler=Quiet, fd=listening.fileno())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": host,
    }.items():
        environ.setenv(name, value)
    try:
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}", faults
    finally:
        server.shutdown()
        server.server_close()
        listening.close()
        thread.join(timeout=10)


@contextmanager
def silent_endpoint() -> Iterator[str]:
    """An address that accepts connections and never says anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
