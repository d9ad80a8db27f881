"""Why roles cannot be placed, in words: plain arithmetic over what the nodes have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treadle.platform.records import RoleSpec

ACCELERATOR_LABEL = "ray.io/accelerator-type"
_NODE_ID = "ray.io/node-id"
_GIB = 2**30
_UNITS = {"CPU": "CPU", "GPU": "GPU", "memory": "GiB of memory"}
_SETTINGS = {"CPU": "cpus", "GPU": "gpus", "memory": "memory_bytes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What one node has in total, and its labels."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """The first role that can never be placed, why, and what to change."""

    reason: str
    remedy: str


def bundle_of(spec: RoleSpec) -> dict[str, float]:
    """What one actor of the role reserves. Ray refuses an empty bundle, hence a trace of a CPU at least."""
    bundle = {"CPU": max(spec.cpus, 0.01)}
    if spec.gpus:
        bundle["GPU"] = spec.gpus
    if spec.memory_bytes:
        bundle["memory"] = float(spec.memory_bytes)
    return bundle


def selector_of(spec: RoleSpec) -> dict[str, str]:
    """The role's labels, its accelerator type among them, as a Ray label selector."""
    return {**spec.labels, **({ACCELERATOR_LABEL: spec.accelerator} if spec.accelerator else {})}


def find_obstacle(specs: Sequence[RoleSpec], nodes: Sequence[NodeFacts]) -> Obstacle | None:
    """The obstacle that no waiting removes, or None when nothing speaks against the placement.

    First every role alone against every node, then all of them together against the sums: what passes can
    still be fragmented, which only the scheduler finds out.
    """
    for spec in specs:
        if obstacle := _alone(spec, nodes):
            return obstacle
    return _together(specs, nodes)


def describe(specs: Sequence[RoleSpec], nodes: Sequence[NodeFacts]) -> str:
    """What is asked for and what there is, in one line."""
    asked = "; ".join(f"{spec.role} {spec.count} × {_needs(spec)}" for spec in specs)
    return f"asked for: {asked}; the cluster has {_totals(nodes)}"


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Ray's label selector: "v", "!v", "in(a,b)" or "!in(a,b)" per label."""
    return all(_matches_one(wanted, labels.get(key)) for key, wanted in selector.items())


def _matches_one(wanted: str, value: str | None) -> bool:
    negated = wanted.startswith("!")
    choice = wanted.removeprefix("!")
    listed = re.fullmatch(r"in\((.*)\)", choice)
    choices = [each.strip() for each in listed.group(1).split(",")] if listed else [choice]
    return (value in choices) != negated


def _alone(spec: RoleSpec, nodes: Sequence[NodeFacts]) -> Obstacle | None:
    selector, bundle = selector_of(spec), bundle_of(spec)
    fitting = [node for node in nodes if matches(selector, node.labels)]
    if not fitting:
        labels = sorted({f"{k}={v}" for node in nodes for k, v in node.labels.items() if k != _NODE_ID})
        return Obstacle(
            reason=f"role {spec.role} needs a node with {_labels(selector)}; "
            f"the cluster has {_totals(nodes)}, labels {', '.join(labels) or 'none'}",
            remedy=f"Change {spec.role}.labels or {spec.role}.accelerator, or add such a node.",
        )
    if any(_fits(bundle, node.resources) for node in fitting):
        return None
    short = next(
        (key for key in bundle if all(bundle[key] > node.resources.get(key, 0.0) for node in fitting)), ""
    )
    where = f" with {_labels(selector)}" if selector else ""
    return Obstacle(
        reason=f"role {spec.role} needs one node{where} with {_needs(spec)}; "
        f"the cluster has {_totals(nodes)}, {_largest(bundle, fitting)}",
        remedy=f"Lower {spec.role}.{_SETTINGS.get(short, 'cpus')}, or add a larger node.",
    )


def _together(specs: Sequence[RoleSpec], nodes: Sequence[NodeFacts]) -> Obstacle | None:
    for key in _UNITS:
        needs = {spec.role: spec.count * bundle_of(spec).get(key, 0.0) for spec in specs}
        total = sum(node.resources.get(key, 0.0) for node in nodes)
        if sum(needs.values()) <= total:
            continue
        parts = ", ".join(f"{role} {_amount(key, need)}" for role, need in needs.items() if need)
        greediest = max(needs, key=lambda role: needs[role])
        return Obstacle(
            reason=f"the roles need {_amount(key, sum(needs.values()))} {_UNITS[key]} together ({parts}), "
            f"the cluster has {_amount(key, total)}",
            remedy=f"Lower {greediest}.count or {greediest}.{_SETTINGS[key]}, or add nodes.",
        )
    return None


def _fits(bundle: Mapping[str, float], resources: Mapping[str, float]) -> bool:
    return all(amount <= resources.get(key, 0.0) for key, amount in bundle.items())


def _needs(spec: RoleSpec) -> str:
    return " + ".join(f"{_amount(key, amount)} {_UNITS[key]}" for key, amount in bundle_of(spec).items())


def _totals(nodes: Sequence[NodeFacts]) -> str:
    sums = {key: sum(node.resources.get(key, 0.0) for node in nodes) for key in _UNITS}
    held = ", ".join(f"{_amount(key, value)} {_UNITS[key]}" for key, value in sums.items())
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''} with {held} in total"


def _largest(bundle: Mapping[str, float], nodes: Sequence[NodeFacts]) -> str:
    best = {key: max(node.resources.get(key, 0.0) for node in nodes) for key in bundle}
    return (
        "at most " + " and ".join(f"{_amount(key, v)} {_UNITS[key]}" for key, v in best.items()) + " on one"
    )


def _labels(selector: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in selector.items())


def _amount(key: str, value: float) -> str:
    return f"{value / _GIB:.1f}" if key == "memory" else f"{value:g}"
