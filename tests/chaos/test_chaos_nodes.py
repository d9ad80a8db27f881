"""Rows 10, 28 and 29: nodes die, or say that they will; Ray's calls fail."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.chaos.attached import QUICK_CHECKS, drain, family
from tests.chaos.book import Row, write_row
from tests.chaos.runs import (
    PATIENT,
    WHOLE_RUN,
    account,
    chaotic,
    clean,
    events_of,
    first_step_after,
    same_bits,
)
from tests.clusters import Node, cluster_of, end_node
from tests.e2e.programs import TINY, WITH_PROMPTS, Program, summary_of, wait_until

pytestmark = WHOLE_RUN

NOTICE_S = 20
COMMIT = Path("checkpoints/rl/step-00000002/COMMITTED")


def steps_of(folder: Path) -> int:
    """Steps whose figures are there."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return max((line["step"] + 1 for line in lines if line["stage"] == "rl"), default=0)


def commits_of(folder: Path) -> list[int]:
    return sorted(
        int(file.parent.name.removeprefix("step-"))
        for file in folder.glob(f"{COMMIT.parent.parent}/*/COMMITTED")
    )


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
            fullest = max(cluster.nodes[1:], key=lambda node: len(family(node, "ray::")))
            roles = [title for title in ("Learner", "Rollout", "Verify") if family(fullest, f"ray::{title}")]
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


def test_row_29_a_spot_machine_is_taken_back_with_notice(tmp_path: Path, undisturbed: Path) -> None:
    """The node with most roles is drained with 20 s to go, and is then gone. Commits would be far apart."""
    folder = tmp_path / "run"
    with cluster_of(Node(cpus=0), *(Node(cpus=4) for _ in range(3)), **QUICK_CHECKS) as cluster:
        program = Program(
            words=(
                *("run", str(TINY), WITH_PROMPTS, *PATIENT, "checkpoint.every_steps=100"),
                *("--dir", str(folder), "--address", cluster.address),
            ),
            environment={**cluster.environment(), "TREADLE_FAILPOINTS": "driver.after_lease=sleep:6@*"},
        )
        process = program.start()
        try:
            assert wait_until(lambda: steps_of(folder) > 0 or process.poll() is not None, 900)
            assert process.poll() is None, process.communicate()
            fullest = max(cluster.nodes[1:], key=lambda node: len(family(node, "ray::")))
            drained = time.time()
            drain(cluster, fullest, NOTICE_S)
            assert wait_until(lambda: bool(events_of(folder, "leaving")) or process.poll() is not None, 60)
            assert wait_until(lambda: any(folder.glob("checkpoints/rl/*/COMMITTED")), 20), "no commit in time"
            committed = time.time() - drained
            time.sleep(max(0.0, drained + NOTICE_S - time.time()))
            done, committed_steps = steps_of(folder), commits_of(folder)
            end_node(fullest)
            out, err = process.communicate(timeout=900)
        except BaseException:
            process.kill()
            raise
        assert process.returncode == 0, (out, err)
    found = account(folder)
    lost = done - committed_steps[-1]
    write_row(
        Row(
            row=29,
            fault="a node is drained with 20 s notice, then gone",
            seconds=[committed],
            account=found,
            same_bits=same_bits(folder, undisturbed),
            figures={"commit after notice s": round(committed, 1), "steps done": done, "steps lost": lost},
        )
    )
    assert clean(found), found
    assert same_bits(folder, undisturbed)
    assert lost <= 1
    assert summary_of(folder)["recoveries"], "the node's death went unnoticed"
