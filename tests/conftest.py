"""Fixtures shared by all tests. Ray is started privately: own folder, own ports, own token; only processes
the tests started are ended."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator

# Before anything imports ray, torch or transformers; worker processes inherit these.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"] = "1"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  the name is Ray's
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background lets them, and all programs they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The plugin would import this at the end of the session, where Python 3.11.7 can trip over its own AST
# recursion counter (CPython gh-106905).
import hypothesis.internal.observability  # noqa: F401
import pytest


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """A private one-node Ray with 8 logical CPUs, shared by one test module."""
    import ray

    folder = tempfile.mkdtemp(prefix="tr", dir="/tmp")
    try:
        ray.init(
            address="local",
            num_cpus=8,
            object_store_memory=400 * 2**20,
            include_dashboard=False,
            log_to_driver=True,
            _temp_dir=folder,
            namespace="test",
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
