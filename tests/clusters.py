"""A separately started, token-protected Ray cluster of two simulated nodes, for tests that attach or submit.

Every node is a process group of its own; closing ends exactly these processes and whatever they have started.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
_GIVEN: set[int] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCluster:
    """Where it listens and what it accepts."""

    address: str  # of the GCS, for attaching
    dashboard: str  # for submitting
    token: str
    folder: Path
    metrics: str  # the head's figures, for Prometheus
    nodes: Sequence[
        subprocess.Popen[bytes]
    ] = ()  # the head first; `end_node` kills one with all its processes

    def environment(self, token: str | None = None) -> dict[str, str]:
        """The environment of a process that uses the cluster; another or no token ("") on request."""
        env = clean_environment(self.folder)
        given = self.token if token is None else token
        return {**env, **({"RAY_AUTH_TOKEN": given} if given else {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One simulated node. `within` are words in front of its command, for a network or a memory of its own. `kept`: its
    processes may end one by one, and be started again; otherwise all end when one dies."""

    cpus: int = 4
    gpus: int = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    within: tuple[str, ...] = ()
    kept: bool = False


HEAD = Node(labels={"ray.io/node-group": "head"})
SECOND = Node(gpus=2, labels={"ray.io/node-group": "rollout", "ray.io/accelerator-type": "H100"})

_KEEPER = """
import contextlib, ctypes, os, subprocess, sys
ctypes.CDLL(None, use_errno=True).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
subprocess.run(sys.argv[1:], check=True)
with contextlib.suppress(ChildProcessError):
    while True:
        os.wait()
"""
"""Starts a node and becomes the parent of its processes, as systemd is on a real machine."""


def clean_environment(home: Path) -> dict[str, str]:
    """This process's environment without anything Ray's, and with a home that holds no token."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "TREADLE_"))}
    env.update(HOME=str(home), RAY_worker_niceness="0", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
    # A crowded machine is slower than Ray expects.
    env.update(
        RAY_agent_register_timeout_ms="100000", RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT="100"
    )
    env["PATH"] = f"{BIN}{os.pathsep}{env.get('PATH', '')}"
    return env


@contextlib.contextmanager
def two_node_cluster(head: Node = HEAD, second: Node = SECOND) -> Iterator[RunningCluster]:
    """Starts head (with dashboard) and second node; ready when both are alive."""
    with cluster_of(head, second) as cluster:
        yield cluster


@contextlib.contextmanager
def cluster_of(head: Node, *others: Node, **settings: str) -> Iterator[RunningCluster]:
    """Starts the head (with dashboard) and the other nodes; ready when all are alive. `settings` are environment
    variables of all nodes."""
    folder = Path(tempfile.mkdtemp(prefix="trc", dir="/tmp"))
    port, dashboard_port, client_port, metrics_port = free_ports(4)
    started: list[subprocess.Popen[bytes]] = []
    cluster = RunningCluster(
        address=f"{head.host}:{port}",
        dashboard=f"http://127.0.0.1:{dashboard_port}",
        token=secrets.token_hex(32),
        folder=folder,
        metrics=f"http://127.0.0.1:{metrics_port}/metrics",
        nodes=started,
    )
    env = {**cluster.environment(), "RAY_AUTH_MODE": "token", **settings}
    first = [
        *("--head", f"--port={port}", f"--dashboard-port={dashboard_port}", "--dashboard-host=127.0.0.1"),
        *(f"--ray-client-server-port={client_port}", f"--metrics-export-port={metrics_port}"),
        "--include-dashboard=true",
    ]
    try:
        started.append(_start(head, first, env, folder, "head"))
        _wait_for(cluster, 1, started, folder)
        for number, node in enumerate(others, 2):
            started.append(_start(node, [f"--address={cluster.address}"], env, folder, f"node{number}"))
        _wait_for(cluster, 1 + len(others), started, folder)
        yield cluster
    finally:
        for process in reversed(started):
            end_node(process)
        shutil.rmtree(folder, ignore_errors=True)


def start_node(cluster: RunningCluster, node: Node, name: str, **settings: str) -> subprocess.Popen[bytes]:
    """One more node joins a running cluster, which ends it, too; it may take a while until it is there."""
    env = {**cluster.environment(), "RAY_AUTH_MODE": "token", **settings}
    started = _start(node, [f"--address={cluster.address}"], env, cluster.folder, name)
    assert isinstance(cluster.nodes, list)
    cluster.nodes.append(started)
    return started


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, none of which this process was given before: who has it may not listen there yet."""
    sockets: list[socket.socket] = []
    found: list[int] = []
    while len(found) < count:
        sockets.append(socket.create_server(("127.0.0.1", 0)))
        if (port := sockets[-1].getsockname()[1]) not in _GIVEN:
            _GIVEN.add(port)
            found.append(port)
    for s in sockets:
        s.close()
    return found


def _start(
    node: Node, arguments: list[str], env: dict[str, str], folder: Path, name: str
) -> subprocess.Popen[bytes]:
    keeper, block = ((sys.executable, "-c", _KEEPER), ()) if node.kept else ((), ("--block",))
    command = [*node.within, *keeper, str(BIN / "ray"), "start", *block, "--disable-usage-stats"]
    command += [f"--node-ip-address={node.host}"]
    # The nodes share a machine, but as little else as two machines do: in one folder, the second one's agent
    # would unpack a job's working folder anew, under the feet of the job.
    command += [f"--temp-dir={folder}/{name}", f"--dashboard-agent-listen-port={free_ports(1)[0]}"]
    command += [f"--num-cpus={node.cpus}", f"--num-gpus={node.gpus}", "--object-store-memory=150000000"]
    if node.resources:
        command.append(f"--resources={json.dumps(dict(node.resources))}")
    if node.labels:
        command.append("--labels=" + ",".join(f"{key}={value}" for key, value in node.labels.items()))
    with (folder / f"{name}.log").open("wb") as out:
        return subprocess.Popen(
            [*command, *arguments], env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def _wait_for(
    cluster: RunningCluster, nodes: int, started: list[subprocess.Popen[bytes]], folder: Path
) -> None:
    """Asks the dashboard how many nodes are alive."""
    import urllib.request

    request = urllib.request.Request(f"{cluster.dashboard}/nodes?view=summary")
    request.add_header("Authorization", f"Bearer {cluster.token}")
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, KeyError):
            with urllib.request.urlopen(request, timeout=5) as answer:
                summary = json.load(answer)["data"]["summary"]
            if sum(node["raylet"].get("state") == "ALIVE" for node in summary) >= nodes:
                return
        if any(process.poll() is not None for process in started):
            break
        time.sleep(0.3)
    logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
    raise AssertionError(f"the cluster did not come up with {nodes} nodes:\n{logs}")


def end_node(process: subprocess.Popen[bytes]) -> None:
    """Ends the node: the process started here and its descendants, by id."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)
    process.wait(timeout=10)
