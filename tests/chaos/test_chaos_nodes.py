"""Rows 10 and 28: nodes die, and Ray's calls fail."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from tests.chaos.book import Row, write_row
from tests.chaos.runs import PATIENT, account, chaotic, clean, first_step_after, same_bits
from tests.clusters import Node, cluster_of, end_node
from tests.e2e.programs import TINY, WITH_PROMPTS, Program, summary_of, wait_until

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.ray,
    pytest.mark.deepspeed,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]

QUICK_CHECKS = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
COMMIT = Path("checkpoints/rl/step-00000002/COMMITTED")


def processes_of(node: subprocess.Popen[bytes], title: str) -> list[psutil.Process]:
    """The node's role processes of a kind."""
    family = psutil.Process(node.pid).children(recursive=True)
    return [member for member in family if member.is_running() and any(title in w for w in member.cmdline())]


def test_row_10_a_node_is_killed_with_all_its_processes(tmp_path: Path, undisturbed: Path) -> None:
    """The roles fill one node and spill to another; a third is empty. The fullest dies: ranks, workers, verifiers."""
    folder = tmp_path / "run"
    with cluster_of(Node(cpus=0), *(Node(cpus=4) for _ in range(3)), **QUICK_CHECKS) as cluster:
        program = Program(
            words=(
                "run",
                str(TINY),
                WITH_PROMPTS,
                *PATIENT,
                "--dir",
                str(folder),
                "--address",
                cluster.address,
            ),
            environment={**cluster.environment(), "TREADLE_FAILPOINTS": "driver.after_lease=sleep:1@*"},
        )
        process = program.start()
        try:
            assert wait_until(lambda: (folder / COMMIT).exists() or process.poll() is not None, 900)
            assert process.poll() is None, process.communicate()
            fullest = max(cluster.nodes[1:], key=lambda node: len(processes_of(node, "ray::")))
            roles = [
                title for title in ("Learner", "Rollout", "Verify") if processes_of(fullest, f"ray::{title}")
            ]
            killed = time.time()
            end_node(fullest)
            out, err = process.communicate(timeout=900)
        except BaseException:
            process.kill()
            raise
        assert process.returncode == 0, (out, err)
    found = account(folder)
    write_row(
        Row(
            row=10,
            fault="a node is killed, raylet and all",
            seconds=[first_step_after(folder, killed)],
            account=found,
            same_bits=same_bits(folder, undisturbed),
            figures={"roles on it": ", ".join(roles), "recoveries": summary_of(folder)["recoveries"]},
        )
    )
    assert clean(found), found
    assert same_bits(folder, undisturbed)
    assert "Learner" in roles


def test_row_28_calls_of_ray_fail_under_everything(tmp_path: Path, undisturbed: Path) -> None:
    """Five in a hundred requests and replies of every call that Ray may repeat are lost."""
    failure = {"num_failures": -1, "req_failure_prob": 5, "resp_failure_prob": 5, "in_flight_failure_prob": 2}
    chaos = chaotic(tmp_path, environment={"RAY_testing_rpc_failure": json.dumps({"*": failure})})
    found = account(chaos.folder)
    write_row(
        Row(
            row=28,
            fault="5 % of Ray's requests, 5 % of its replies are lost",
            account=found,
            same_bits=same_bits(chaos.folder, undisturbed),
            figures={"wall s": round(chaos.ended.wall_s, 1)},
        )
    )
    assert clean(found), found
    assert same_bits(chaos.folder, undisturbed)
