"""A real S3 protocol server for tests, which can be told to answer badly."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BUCKET = "treadle-test"


class Faults:
    """In front of the server: answers the next requests for objects with the faults in `due`.

    "500" and "503" are errors as S3 words them; "cut" promises the whole body and ends half-way.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.due: list[str] = []
        self.seen = 0
        self._application = application

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        is_object = environ["PATH_INFO"].count("/") > 1
        self.seen += is_object
        fault = self.due.pop(0) if self.due and is_object else ""
        if fault == "cut":
            body = b"".join(self._application(environ, start_response))
            return [body[: len(body) // 2]]
        if fault:
            code = {"500": "InternalError", "503": "SlowDown"}[fault]
            body = f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            start_response(f"{fault} {code}", headers)
            return [body]
        return self._application(environ, start_response)


@contextmanager
def s3_server(environ: pytest.MonkeyPatch) -> Iterator[tuple[str, Faults]]:
    """Starts moto's server and points the environment at it. Yields the URL of an empty bucket, and the
    faults."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_: object) -> None: ...

    faults = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        environ.setenv(name, value)
    try:
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}", faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


@contextmanager
def silent_endpoint() -> Iterator[str]:
    """An address that accepts connections and never says anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
