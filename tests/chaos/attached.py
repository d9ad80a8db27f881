"""A run on a cluster that was started separately, which something happens to in the middle."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tests.chaos.runs import COMMIT, PATIENT
from tests.clusters import BIN, RunningCluster
from tests.e2e.programs import TINY, WITH_PROMPTS, Program, wait_until

QUICK_CHECKS = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""Ray finds out within two seconds that a node is dead."""


@dataclass(slots=True, kw_only=True)
class Attached:
    """The run while it plays. Its output is in a file: a pipe that nobody reads fills up."""

    folder: Path
    process: subprocess.Popen[str]
    said: Path

    def steps(self) -> list[dict[str, Any]]:
        """The figures of every step made so far."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [found for line in lines if (found := json.loads(line))["stage"] == "rl"]

    def reaches(self, step: int, within_s: float = 900) -> None:
        """Waits until the step is made."""
        self.until(lambda: len(self.steps()) >= step, within_s)

    def until(self, holds: Any, within_s: float = 900) -> None:
        assert wait_until(lambda: holds() or self.process.poll() is not None, within_s), self.said.read_text()
        assert self.process.poll() is None, self.said.read_text()

    def end(self, within_s: float = 900) -> None:
        """The run must end well."""
        assert self.process.wait(within_s) == 0, self.said.read_text()


@contextmanager
def attached(
    folder: Path,
    cluster: RunningCluster,
    *settings: str,
    environment: Mapping[str, str] | None = None,
    when: str = COMMIT,
) -> Iterator[Attached]:
    """A run of the tiny recipe on the cluster, from the moment the file `when` is in its folder."""
    words = ("run", str(TINY), WITH_PROMPTS, *PATIENT, *settings, "--dir", str(folder / "run"))
    around = {**cluster.environment(), **(environment or {})}
    program = Program(words=(*words, "--address", cluster.address), environment=around)
    folder.mkdir(parents=True, exist_ok=True)
    said = folder / "said.log"
    with said.open("w") as log:
        process = program.start_into(log)
    try:
        run = Attached(folder=folder / "run", process=process, said=said)
        run.until(lambda: (run.folder / when).exists())
        yield run
    finally:
        process.kill()
        process.wait(60)


def family(node: subprocess.Popen[bytes], title: str) -> list[psutil.Process]:
    """The node's processes of a kind: whose command line has the words."""
    found = []
    for member in psutil.Process(node.pid).children(recursive=True):
        try:
            if title in " ".join(member.cmdline()):
                found.append(member)
        except psutil.NoSuchProcess:
            continue
    return found


def drain(cluster: RunningCluster, node: subprocess.Popen[bytes], left_s: int) -> None:
    """Tells Ray's head that a node will be gone, as a provider's notice does."""
    [node_id] = [
        word.split("=", 1)[1]
        for process in psutil.Process(node.pid).children(recursive=True)
        if process.name() == "raylet"
        for word in process.cmdline()
        if word.startswith("--node_id=")
    ]
    command = [str(BIN / "ray"), "drain-node", "--address", cluster.address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back"]
    command += ["--deadline-remaining-seconds", str(left_s)]
    subprocess.run(command, env={**cluster.environment(), "RAY_AUTH_MODE": "token"}, check=True, timeout=60)
