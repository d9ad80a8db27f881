"""Roles on the nodes of a real cluster of two. Every test is a driver process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
from tests.clusters import RunningCluster

pytestmark = pytest.mark.ray

PRELUDE = """
import json, os, time
from treadle.cluster.session import ClusterConfig, open_session
from treadle.platform.errors import TreadleError
from treadle.platform.records import RoleSpec

def say(**fields):
    print("SAYS " + json.dumps(fields), flush=True)

with open_session(ClusterConfig(address=os.environ["CLUSTER"])):
    import ray
    from treadle.cluster.placement import reserve
    @ray.remote
    class Role:
        def where(self):
            node = ray.get_runtime_context().get_node_id()
            labels = next(n["Labels"] for n in ray.nodes() if n["NodeID"] == node)
            return labels.get("ray.io/node-group"), ray.get_runtime_context().get_accelerator_ids()["GPU"]
    def refusal(*specs, timeout_s=60.0, strategy="PACK"):
        start = time.monotonic()
        try:
            reserve(specs, timeout_s, strategy).release()
        except TreadleError as error:
            say(kind=type(error).__name__, text=str(error), seconds=time.monotonic() - start)
"""


def _drive(cluster: RunningCluster, body: str) -> list[dict[str, object]]:
    code = PRELUDE + textwrap.indent(textwrap.dedent(body), "    ")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**cluster.environment(), "CLUSTER": cluster.address},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("SAYS ")]


def test_roles_are_placed_by_label_and_accelerator_and_released(running_cluster: RunningCluster) -> None:
    body = """
    specs = (
        RoleSpec(role="learner", count=1, cpus=1, labels={"ray.io/node-group": "head"}),
        RoleSpec(role="rollout", count=2, cpus=1, gpus=1, accelerator="H100"),
        RoleSpec(role="broadcast", count=1, cpus=0),
    )
    placement = reserve(specs, 60.0)
    handles = {
        (spec.role, i): Role.options(**placement.options(spec.role, i)).remote()
        for spec in specs for i in range(spec.count)
    }
    say(**{f"{role}{i}": ray.get(handle.where.remote()) for (role, i), handle in handles.items()})
    try:
        placement.options("rollout", 2)
    except TreadleError as error:
        say(error=str(error))
    placement.release()
    again = reserve(specs, 60.0)
    say(again=len(again.specs))
    """
    placed, missing, again = _drive(running_cluster, body)
    assert placed["learner0"] == ["head", []]
    assert {placed["rollout0"][0], placed["rollout1"][0]} == {"rollout"}  # type: ignore[index]
    assert sorted([*placed["rollout0"][1], *placed["rollout1"][1]]) == ["0", "1"]  # type: ignore[index]
    assert "No bundle was reserved for rollout 2" in str(missing["error"])
    assert again["again"] == 3


def test_impossible_placements_are_diagnosed_within_seconds(running_cluster: RunningCluster) -> None:
    body = """
    refusal(RoleSpec(role="learner", count=1, gpus=8))
    refusal(RoleSpec(role="rollout", count=1, accelerator="B200"))
    refusal(RoleSpec(role="verify", count=40))
    refusal(RoleSpec(role="learner", count=3, cpus=1), strategy="STRICT_SPREAD")
    """
    gpus, accelerator, count, spread = _drive(running_cluster, body)
    assert "role learner needs one node with 1 CPU + 8 GPU" in str(gpus["text"])
    assert "learner.gpus" in str(gpus["text"])
    assert "accelerator-type=B200" in str(accelerator["text"])
    assert "40 CPU together" in str(count["text"])
    assert "strategy STRICT_SPREAD" in str(spread["text"])
    for answer in (gpus, accelerator, count, spread):
        assert answer["kind"] == "PlacementError"
        assert "\n" not in str(answer["text"])
        assert float(str(answer["seconds"])) < 15


def test_a_busy_cluster_is_waited_for_and_then_named(running_cluster: RunningCluster) -> None:
    body = """
    specs = (RoleSpec(role="rollout", count=2, cpus=1, gpus=1),)
    first = reserve(specs, 60.0)
    refusal(*specs, timeout_s=3.0)
    import threading
    threading.Timer(3.0, first.release).start()
    start = time.monotonic()
    reserve(specs, 60.0).release()
    say(waited=time.monotonic() - start)
    """
    busy, freed = _drive(running_cluster, body)
    assert "large enough but busy" in str(busy["text"])
    assert "placement_deadline_s" in str(busy["text"])
    assert 2.0 < float(str(freed["waited"])) < 60


def test_further_actors_get_places_of_their_own_or_a_diagnosis_and_give_them_back(
    running_cluster: RunningCluster,
) -> None:
    """Of the two GPUs the run's own placement takes one."""
    body = """
    import asyncio
    from treadle.cluster.places import Places
    spec = RoleSpec(role="rollout", count=1, cpus=1, gpus=1)
    placement = reserve([spec], 60.0)
    places = Places(placement, spec, embedded=False, deadline_s=2.0)
    def role(index):
        return ray.get(Role.options(**places.options(index)).remote().where.remote(), timeout=60)
    async def grow(count):
        await places.reserve(count)
        return [await places.has(index) for index in range(min(count, 2))]
    def options_of(index):
        try:
            return sorted(places.options(index))
        except TreadleError as error:
            return f"{type(error).__name__}: {error}"
    say(held=asyncio.run(grow(3)), gpus=[len(role(0)[1]), len(role(1)[1])], third=options_of(2))
    say(nodes=len(places.nodes()))
    places.give_back([0])
    say(again=asyncio.run(grow(2)), gpus=len(role(1)[1]), unheard=placement.held("rollout", 0))
    places.give_back(())
    embedded = Places(placement, RoleSpec(role="rollout", count=1, cpus=1), embedded=True, deadline_s=2.0)
    asyncio.run(embedded.reserve(2))
    say(embedded=embedded.options(1), has=asyncio.run(embedded.has(1)))
    placement.release()
    """
    grown, nodes, again, embedded = _drive(running_cluster, body)
    assert (grown["held"], grown["gpus"]) == ([True, True], [1, 1])
    assert "PlacementError: The roles were not placed within 2 s" in str(grown["third"])
    assert nodes == {"nodes": 1}
    assert again == {"again": [True, True], "gpus": 1, "unheard": True}
    assert embedded == {"embedded": {"num_cpus": 0}, "has": True}


def test_the_faults_that_were_ordered_of_a_driver_reach_its_actors(running_cluster: RunningCluster) -> None:
    code = """
    import os
    os.environ["TREADLE_FAILPOINTS"] = "learner.before_step=kill@9"
    """
    body = """
    @ray.remote
    def ordered():
        return os.environ.get("TREADLE_FAILPOINTS")
    say(ordered=ray.get(ordered.remote(), timeout=100))
    """
    program = textwrap.dedent(code) + PRELUDE + textwrap.indent(textwrap.dedent(body), "    ")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**running_cluster.environment(), "CLUSTER": running_cluster.address},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert 'SAYS {"ordered": "learner.before_step=kill@9"}' in done.stdout
