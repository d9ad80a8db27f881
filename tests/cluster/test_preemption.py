"""Notices that a node leaves, on a real cluster whose second node is drained."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tests.clusters import BIN, Node, cluster_of

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
PROGRAM = """
import json, math, os, subprocess, sys, time
from treadle.cluster.session import ClusterConfig, open_session
from treadle.platform.records import RoleSpec

with open_session(ClusterConfig(address=os.environ["CLUSTER"])):
    import ray
    from treadle.cluster.placement import reserve
    from treadle.cluster.preemption import leaving
    @ray.remote
    class Role:
        def where(self):
            return ray.get_runtime_context().get_node_id()
    placement = reserve([RoleSpec(role="rollout", count=1, cpus=1)], 60.0)
    role = Role.options(**placement.options("rollout", 0)).remote()
    node = ray.get(role.where.remote(), timeout=60)
    before = dict(leaving())
    subprocess.run([*json.loads(sys.argv[1]), "--node-id", node], check=True, stdout=sys.stderr)
    until = time.monotonic() + 30
    while not leaving() and time.monotonic() < until:
        time.sleep(0.2)
    print("SAYS " + json.dumps([node, sorted(placement.nodes()), before, dict(leaving())]), flush=True)
"""


def test_a_drained_node_is_told_with_the_seconds_it_has_left() -> None:
    with cluster_of(Node(cpus=0), Node(cpus=2)) as cluster:
        drain = [str(BIN / "ray"), "drain-node", "--address", cluster.address]
        drain += [
            "--reason",
            "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message",
            "the spot machine is taken back",
        ]
        drain += ["--deadline-remaining-seconds", "120"]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(drain)],
            env={**cluster.environment(), "CLUSTER": cluster.address},
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    [said] = [line[5:] for line in done.stdout.splitlines() if line.startswith("SAYS ")]
    node, placed, before, after = json.loads(said)
    assert placed == [node]
    assert before == {}
    assert list(after) == [node]
    assert 60 < after[node] <= 120
