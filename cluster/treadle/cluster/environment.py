"""What must be in the environment before anything imports ray. Imports no ray itself."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from treadle.platform.errors import ClusterError

_DEFAULTS = {
    # Ray reads the mode when it is imported, the token when it connects.
    "RAY_AUTH_MODE": "token",
    # Workers otherwise run at nice 15 and starve beside anything else.
    "RAY_worker_niceness": "0",
    # Tensors are copied several times otherwise; read once, when ray is imported.
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    # `uv run` would otherwise zip the current folder and ship it to every worker.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A role that asks for no GPU sees none; otherwise it could fill the memory of another role's.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # On a crowded machine the node's agents take longer than the 15 s after which Ray's node gives up on
    # them.
    "RAY_agent_register_timeout_ms": "60000",
    # A frozen process keeps its CPUs and GPU from its successor until Ray kills it, by default 5 s after it was told to
    # end.
    "RAY_kill_worker_timeout_milliseconds": "1000",
}

NO_PRESTART = {"RAY_prestart_worker_first_driver": "0"}
"""For a cluster whose workers all have a runtime environment: Ray would start a worker per core without one, for
nobody."""


def passed_on() -> dict[str, str]:
    """The variables that a process on a running cluster gets from this one: Treadle's own, and what Ray reads there
    when it is imported. No token, and nothing else that might be secret: Ray shows them in clear text."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("TREADLE_")}
    zero_copy = "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"
    return {**ours, zero_copy: os.environ.get(zero_copy, _DEFAULTS[zero_copy])}


TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def prepare_environment(token_file: str = "") -> None:
    """Sets Ray's environment for this process and its children. What is already set stays as it is.

    Call it first thing in a program: Ray reads part of this only once, when it is imported. `token_file`
    replaces a token given by the environment. Raises `ClusterError` when it cannot be read or is empty.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if token_file:
        path = Path(token_file).expanduser()
        _read(path)
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def prepare_embedded() -> None:
    """Sets what only an embedded cluster needs: a token, the given one or a new one that only this process
    and its children know."""
    os.environ["RAY_AUTH_MODE"] = "token"
    if not any(os.environ.get(name) for name in TOKEN_VARIABLES):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def given_token() -> str:
    """The token the environment gives, or an empty string. The one in the home folder counts too where Ray
    itself would take it: on the way to a running cluster. Raises `ClusterError` for an unreadable file."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH", ""):
        return _read(Path(path).expanduser())
    home = Path.home() / ".ray" / "auth_token"
    return home.read_text().strip() if home.is_file() else ""


def _read(path: Path) -> str:
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise ClusterError(
            f"The token file {path} cannot be read: {error.strerror}.",
            "Set cluster.token_file to a readable file.",
        ) from error
    if not token:
        raise ClusterError(f"The token file {path} is empty.", "Write the cluster's token into it.")
    return token
