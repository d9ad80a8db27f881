"""The words for placements that cannot be."""

from __future__ import annotations

import pytest

from treadle.cluster.diagnosis import NodeFacts, bundle_of, find_obstacle, matches, selector_of
from treadle.platform.records import RoleSpec

CPU_NODE = NodeFacts(name="a", resources={"CPU": 2.0, "memory": 8 * 2.0**30}, labels={"zone": "1"})
GPU_NODE = NodeFacts(
    name="b",
    resources={"CPU": 8.0, "GPU": 4.0, "memory": 64 * 2.0**30},
    labels={"ray.io/accelerator-type": "H100"},
)
NODES = (CPU_NODE, GPU_NODE)


def _spec(role: str = "learner", count: int = 1, **needs: object) -> RoleSpec:
    return RoleSpec(role=role, count=count, **needs)  # type: ignore[arg-type]


def test_what_fits_has_no_obstacle() -> None:
    specs = [_spec(gpus=4, accelerator="H100"), _spec("verify", 2, cpus=1.0), _spec("broadcast", cpus=0.0)]
    assert find_obstacle(specs, NODES) is None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (_spec(gpus=8), ["role learner", "1 CPU + 8 GPU", "2 nodes", "4 GPU on one", "learner.gpus"]),
        (_spec(cpus=9), ["9 CPU", "10 CPU", "at most 8 CPU on one", "learner.cpus"]),
        (_spec(memory_bytes=100 * 2**30), ["100.0 GiB of memory", "64.0 GiB", "learner.memory_bytes"]),
        (_spec(accelerator="B200"), ["accelerator-type=B200", "H100", "learner.accelerator"]),
        (_spec(labels={"zone": "9"}), ["zone=9", "zone=1", "learner.labels"]),
        (_spec(gpus=1, labels={"zone": "1"}), ["with zone=1", "0 GPU on one", "learner.gpus"]),
        (_spec("rollout", 11), ["11 CPU together", "rollout 11", "cluster has 10", "rollout.count"]),
        (_spec("rollout", 5, gpus=1), ["5 GPU together", "cluster has 4", "rollout.gpus"]),
    ],
)
def test_an_obstacle_names_role_need_supply_and_setting(spec: RoleSpec, words: list[str]) -> None:
    obstacle = find_obstacle([spec], NODES)
    assert obstacle is not None
    text = f"{obstacle.reason} {obstacle.remedy}"
    assert all(word in text for word in words), text


def test_roles_that_fit_alone_but_not_together_are_an_obstacle() -> None:
    obstacle = find_obstacle([_spec(cpus=6), _spec("rollout", cpus=6)], NODES)
    assert obstacle is not None
    assert "learner 6, rollout 6" in obstacle.reason


def test_an_empty_cluster_is_an_obstacle() -> None:
    obstacle = find_obstacle([_spec()], ())
    assert obstacle is not None
    assert "0 nodes" in obstacle.reason


@pytest.mark.parametrize(
    ("wanted", "value", "expected"),
    [
        ("H100", "H100", True),
        ("H100", None, False),
        ("!H100", "H20", True),
        ("!H100", None, True),
        ("in(H20, L40S)", "L40S", True),
        ("in(H20,L40S)", "H100", False),
        ("!in(H20,L40S)", "H100", True),
    ],
)
def test_selectors_are_read_as_ray_reads_them(wanted: str, value: str | None, expected: bool) -> None:
    assert matches({"k": wanted}, {"k": value} if value else {}) is expected


def test_a_role_without_needs_still_gets_a_bundle_ray_accepts() -> None:
    assert 0 < bundle_of(_spec(cpus=0.0))["CPU"] < 0.1
    assert selector_of(_spec(accelerator="H100", labels={"zone": "1"})) == {
        "zone": "1",
        "ray.io/accelerator-type": "H100",
    }
