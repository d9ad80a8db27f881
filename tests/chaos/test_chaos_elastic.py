"""A worker whose node dies where no other has room, and a driver that a game day freezes: beside the matrix."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.attached import QUICK_CHECKS, family
from tests.chaos.runs import PATIENT, WHOLE_RUN, account, clean, events_of, same_bits
from tests.chaos.test_chaos_nodes import steps_of
from tests.clusters import Node, cluster_of, end_node, start_node
from tests.e2e.programs import TINY, WITH_PROMPTS, Program, patiently, samples_of, summary_of, wait_until

pytestmark = WHOLE_RUN

ENGINES = Node(cpus=1, gpus=1)
"""Room for one rollout worker; the other roles fill a node without a GPU."""


def test_a_run_goes_on_with_fewer_workers_when_a_node_dies_and_grows_back_when_one_joins(
    tmp_path: Path, undisturbed: Path
) -> None:
    folder = tmp_path / "run"
    with cluster_of(Node(cpus=0), Node(cpus=3), ENGINES, ENGINES, **QUICK_CHECKS) as cluster:
        program = Program(
            words=(
                *("run", str(TINY), WITH_PROMPTS, *PATIENT, "rollout.gpus=1", "rollout.max_restarts=2"),
                *("--dir", str(folder), "--address", cluster.address),
            ),
            environment={**cluster.environment(), "TREADLE_FAILPOINTS": "learner.before_step=sleep:20@*"},
        )
        process = program.start()
        try:

            def until(holds: Callable[[], object]) -> None:
                assert wait_until(lambda: bool(holds()) or process.poll() is not None, 900)
                assert process.poll() is None, process.communicate()

            until(lambda: steps_of(folder) > 0)
            [lost, _] = [node for node in cluster.nodes[2:] if family(node, "ray::RolloutActor")]
            struck = time.time()
            end_node(lost)
            until(lambda: events_of(folder, "shrunk"))
            [shrunk] = events_of(folder, "shrunk")
            made = steps_of(folder)
            until(lambda: steps_of(folder) > made)
            fresh = start_node(cluster, ENGINES, "fresh", **QUICK_CHECKS)
            until(lambda: [event for event in events_of(folder, "replaced") if event["role"] == "rollout"])
            assert family(fresh, "ray::RolloutActor")
            out, err = process.communicate(timeout=900)
        except BaseException:
            process.kill()
            raise
        assert process.returncode == 0, (out, err)
    assert shrunk["workers"] == 1
    assert shrunk["time"] - struck < 30
    assert "its node died" in shrunk["message"]
    assert (
        summary_of(folder)["replacements"]["rollout"] == 1
    )  # the coordinator may have been on that node, too
    assert clean(account(folder)), account(folder)
    assert same_bits(folder, undisturbed)


def test_a_driver_that_a_game_day_freezes_is_taken_over_and_refused_when_it_wakes(
    tmp_path: Path, undisturbed: Path
) -> None:
    folder, plan = tmp_path / "run", tmp_path / "plan.yaml"
    plan.write_text("faults:\n  - driver.after_lease@3: freeze\n  - driver.after_lease@4: kill\n")
    words = (
        "chaos",
        str(TINY),
        WITH_PROMPTS,
        f"--plan={plan}",
        f"--dir={folder}",
        f"--compare={undisturbed}",
    )
    program, ended = patiently(*words, "--json")
    assert ended.code == 0, ended
    assert program.all_gone(within_s=90), program.survivors()
    told = json.loads(ended.out)
    assert (told["drivers"], told["zombie_drivers"], told["broken"]) == (3, [1], [])
    assert told["same_digest"]
    assert samples_of(folder) == samples_of(undisturbed)
