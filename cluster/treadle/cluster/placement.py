"""Roles on nodes: one placement group for all of them, so that they are placed together or not at all.

Two runs that each hold half of what they need would wait for each other forever; one group cannot.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from treadle.cluster.diagnosis import NodeFacts, bundle_of, describe, find_obstacle, selector_of
from treadle.platform.errors import ClusterError, PlacementError
from treadle.platform.records import RoleSpec

_PATIENCE_S = 5.0  # nodes that are just joining may make an infeasible group feasible


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Reserved bundles, one per actor. Releasing them kills the actors inside."""

    group: Any
    specs: tuple[RoleSpec, ...]

    def options(self, role: str, index: int) -> dict[str, Any]:
        """The actor options of the role's actor `index`.

        Example: `RolloutWorker.options(**placement.options("rollout", 0)).remote(...)`.
        """
        spec, position = self._bundle(role, index)
        return {
            "num_cpus": spec.cpus,
            "num_gpus": spec.gpus,
            "memory": spec.memory_bytes or None,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self.group,
                placement_group_bundle_index=position,
                placement_group_capture_child_tasks=False,
            ),
        }

    def held(self, role: str, index: int) -> bool:
        """Whether a living node holds the bundle now. Asks Ray's head: not for an event loop. Raises `ClusterError`
        when it does not answer."""
        _, position = self._bundle(role, index)
        try:
            node = placement_group_table(self.group)["bundles_to_node_id"].get(position, "")
            return any(known["NodeID"] == node and known["Alive"] for known in ray.nodes())
        except (RayError, RuntimeError) as error:
            raise ClusterError(
                f"Ray's head does not say where {role} {index} has its place: {error}"
            ) from error

    def _bundle(self, role: str, index: int) -> tuple[RoleSpec, int]:
        first = 0
        for spec in self.specs:
            if spec.role == role and index < spec.count:
                return spec, first + index
            first += spec.count
        raise PlacementError(f"No bundle was reserved for {role} {index}.", "Reserve it with its RoleSpec.")

    def nodes(self) -> frozenset[str]:
        """The ids of the nodes that hold a bundle now. Asks Ray's head: not for an event loop."""
        return frozenset(placement_group_table(self.group)["bundles_to_node_id"].values())

    def release(self) -> None:
        """Gives everything back."""
        remove_placement_group(self.group)


def reserve(specs: Sequence[RoleSpec], timeout_s: float, strategy: str = "PACK") -> Placement:
    """Reserves all roles at once, or raises `PlacementError` and reserves nothing.

    What can never be placed on the cluster's nodes is refused within seconds with a diagnosis; what is merely
    busy is waited for until `timeout_s`.
    """
    wanted = tuple(spec for spec in specs if spec.count > 0)
    _refuse_the_impossible(wanted)
    group = placement_group(
        [bundle_of(spec) for spec in wanted for _ in range(spec.count)],
        strategy=strategy,
        bundle_label_selector=[selector_of(spec) for spec in wanted for _ in range(spec.count)],
    )
    try:
        _wait(group, wanted, timeout_s, strategy)
    except BaseException:
        remove_placement_group(group)
        raise
    return Placement(group=group, specs=wanted)


def nodes() -> tuple[NodeFacts, ...]:
    """The living nodes."""
    return tuple(
        NodeFacts(name=node["NodeName"], resources=node["Resources"], labels=node.get("Labels") or {})
        for node in ray.nodes()
        if node["Alive"]
    )


def _refuse_the_impossible(specs: Sequence[RoleSpec]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while (obstacle := find_obstacle(specs, nodes())) is not None:
        if time.monotonic() >= deadline:
            raise PlacementError(f"Impossible placement: {obstacle.reason}.", obstacle.remedy)
        time.sleep(0.5)


def _wait(group: Any, specs: Sequence[RoleSpec], timeout_s: float, strategy: str) -> None:
    start = time.monotonic()
    while not group.wait(min(1.0, timeout_s)):
        waited_s = time.monotonic() - start
        state = placement_group_table(group)["stats"]["scheduling_state"]
        if state == "INFEASIBLE" and waited_s >= _PATIENCE_S:
            raise PlacementError(
                "Impossible placement: no arrangement of the nodes holds all roles "
                f"({describe(specs, nodes())}; strategy {strategy}).",
                "Lower the roles' count, cpus, gpus or memory_bytes, or add nodes.",
            )
        if waited_s >= timeout_s:
            raise PlacementError(
                f"The roles were not placed within {timeout_s:g} s: the cluster is large enough but busy "
                f"({describe(specs, nodes())}; free: {_free()}).",
                "Wait for other jobs, lower the roles' counts, or raise cluster.placement_deadline_s.",
            )


def _free() -> str:
    free = ray.available_resources()
    return ", ".join(f"{free.get(key, 0.0):g} {key}" for key in ("CPU", "GPU"))
