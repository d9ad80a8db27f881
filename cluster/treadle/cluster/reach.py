"""Cheap questions to a cluster before Ray itself is asked, which would wait a minute or print a wall of text.

Only the port, the token and the version are looked at: one TCP connection, one call.
"""

from __future__ import annotations

import os
import re
import socket
import urllib.error
import urllib.request
from importlib.metadata import version

from treadle.platform.errors import ClusterError

_CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_TOKEN_REMEDY = "Set RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or cluster.token_file to the cluster's token."


def check_cluster(address: str, token: str, deadline_s: float) -> None:
    """Raises `ClusterError` in one sentence when nobody answers at `address` ("host:port"), the token is
    missing or wrong, or the cluster runs another Ray than this process."""
    host, port = split_address(address)
    _knock(host, port, f"cluster.address={address}", deadline_s)
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return  # the token travels inside TLS, which Ray sets up itself
    _check_token(f"{host}:{port}", token, deadline_s)


def check_dashboard(url: str, token: str, deadline_s: float) -> None:
    """The same for a dashboard's address ("http://host:port"), where jobs are submitted."""
    request = urllib.request.Request(f"{url.rstrip('/')}/api/version")
    if not url.startswith(("http://", "https://")):
        raise ClusterError(
            f"{url!r} is no dashboard address.", "Use http://host:8265, where the dashboard listens."
        )
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=deadline_s) as answer:
            _check_version(url, answer.read().decode())
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise _refused(url, token) from error
        raise ClusterError(
            f"{url} answered {error.code} {error.reason}.", "Check that it is the address of a Ray dashboard."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "reason", error)
        raise ClusterError(
            f"No Ray dashboard answers at {url} ({reason}).",
            "Check the address and that the cluster is running.",
        ) from error


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port". Raises `ClusterError` for anything else."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise ClusterError(
            f"cluster.address={address!r} is not understood.",
            'Use "" for an embedded Ray, "auto", or the head\'s "host:port" (6379 by default).',
        )
    return host.strip("[]"), int(port)


def _knock(host: str, port: int, what: str, deadline_s: float) -> None:
    try:
        socket.create_connection((host, port), timeout=deadline_s).close()
    except OSError as error:
        raise ClusterError(
            f"No Ray cluster answers at {what} ({error.strerror or error}).",
            "Check the address and that the cluster is running.",
        ) from error


def _check_token(target: str, token: str, deadline_s: float) -> None:
    import grpc  # with ray's own dependencies; half a second that only attaching pays

    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(target) as channel:
        try:
            answer = channel.unary_unary(_CHECK_ALIVE)(b"", timeout=deadline_s, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise _refused(target, token) from error
            raise ClusterError(
                f"What listens at cluster.address={target} does not answer like a Ray cluster "
                f"({error.code().name.lower()}).",
                "Use the port of the head's GCS (6379 by default), not the dashboard's.",
            ) from error
    _check_version(target, answer.decode(errors="replace"))


def _check_version(where: str, answer: str) -> None:
    theirs, ours = re.search(r"\d+\.\d+\.\d+", answer), version("ray")
    if theirs and theirs.group() != ours:
        raise ClusterError(
            f"The cluster at {where} runs Ray {theirs.group()}, this environment has {ours}.",
            f"Install ray=={theirs.group()} here, or {ours} there.",
        )


def _refused(where: str, token: str) -> ClusterError:
    if token:
        return ClusterError(f"The cluster at {where} refuses the token: it is wrong.", _TOKEN_REMEDY)
    return ClusterError(f"The cluster at {where} asks for a token and none is set.", _TOKEN_REMEDY)
