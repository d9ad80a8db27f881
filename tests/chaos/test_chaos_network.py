"""Rows 12 and 13: the network between machines is gone for a while, or slow.

The second machine is a namespace of its own, behind a link that loses packets or carries few (`links`).
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tests.chaos.attached import Attached, attached, family
from tests.chaos.book import Row, write_row
from tests.chaos.links import NEEDS_LINKS, Link, link_to_a_second_machine
from tests.chaos.runs import WHOLE_RUN, account, clean, events_of, same_bits, struck
from tests.clusters import Node, RunningCluster, cluster_of
from tests.e2e.buckets import MIRRORED, kinds
from tests.e2e.programs import Program, samples_of, summary_of, wait_until
from tests.platform.object_store import s3_server

pytestmark = [*WHOLE_RUN, pytest.mark.s3, NEEDS_LINKS]

AFTER_HEAL_S = 10.0
MOMENT_S = 8.0
ZOMBIES_S = 60.0
CHECKS = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}
"""Ray takes a node that cannot be reached for 20 s for dead."""
SLOWLY = {"TREADLE_FAILPOINTS": "learner.before_step[1]=sleep:2@*"}


@contextmanager
def cluster_over(links: list[Link], **settings: str) -> Iterator[RunningCluster]:
    """Ranks and verifiers here, engines on a machine behind a link."""
    label = "ray.io/accelerator-type"
    head = Node(cpus=6, host=links[0].near, labels={label: "A100"})
    others = [Node(cpus=2, host=link.far, within=link.within, labels={label: "H100"}) for link in links]
    with cluster_of(head, *others, **settings) as cluster:
        yield cluster


ENGINES_THERE = ("rollout.accelerator=H100", "learner.accelerator=A100")


def drawing(cluster: RunningCluster) -> int:
    """Which of the machines behind links has the engines."""
    return max((1, 2), key=lambda at: len(family(cluster.nodes[at], "ray::RolloutActor"))) - 1


def test_row_12_the_network_is_cut_between_engines_and_learner_and_to_the_bucket(
    tmp_path: Path, undisturbed: Path
) -> None:
    cuts = [engines_cut_off(tmp_path / "engines"), bucket_cut_off(tmp_path / "bucket")]
    accounts = [account(one.folder) for one in cuts]
    bits = all(same_bits(one.folder, undisturbed) for one in cuts)
    write_row(
        Row(
            row=12,
            fault=f"engines cut off for {MOMENT_S:g} s, then until their node is given up; the bucket cut off",
            seconds=[one.after_heal_s for one in cuts],
            budget_s=AFTER_HEAL_S,
            account=accounts[0],
            same_bits=bits,
            figures={**cuts[0].figures, **cuts[1].figures},
        )
    )
    assert all(map(clean, accounts)), accounts
    assert bits
    assert samples_of(cuts[0].folder) == samples_of(undisturbed)
    assert all(one.after_heal_s <= AFTER_HEAL_S for one in cuts), cuts


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A run whose network was cut, and how long it took to get over it."""

    folder: Path
    after_heal_s: float
    figures: dict[str, float | int | str]


def engines_cut_off(folder: Path) -> Cut:
    """First for a moment, then for so long that they are replaced elsewhere. Their own node comes back to life with
    the link, and must be given nothing to do."""
    with ExitStack() as stack:
        links = [stack.enter_context(link_to_a_second_machine(number)) for number in (1, 2)]
        cluster = stack.enter_context(cluster_over(links, **CHECKS, **SLOWLY))
        run = stack.enter_context(attached(folder, cluster, *ENGINES_THERE))
        there = drawing(cluster)
        zombies = family(cluster.nodes[there + 1], "ray::RolloutActor")
        cut_s, healed_s = cut(links[there], MOMENT_S)
        short = first_step_within(run, healed_s)
        gone_s = time.time()
        links[there].up = False
        run.until(lambda: any(e["role"] == "rollout" for e in events_of(run.folder, "replaced")), 240)
        links[there].up, back_s = True, time.monotonic()
        _, left = psutil.wait_procs(zombies, timeout=ZOMBIES_S)
        gone_after_s = time.monotonic() - back_s
        run.end()
    assert not left, "what was cut off and replaced lives on"
    times = [gone_s, *(line["time"] for line in run.steps() if line["time"] > gone_s)]
    return Cut(
        folder=run.folder,
        after_heal_s=short,
        figures={
            "step after the short cut s": round(healed_s + short - cut_s, 1),
            "longest stall of the long cut s": round(max(b - a for a, b in itertools.pairwise(times)), 1),
            "engines cut off": len(zombies),
            "their processes ended s after the heal": round(gone_after_s, 1),
        },
    )


def cut(link: Link, seconds: float) -> tuple[float, float]:
    """Nothing passes for that long. When it began and ended (Unix seconds)."""
    began = time.time()
    link.up = False
    time.sleep(seconds)
    link.up = True
    return began, time.time()


def first_step_within(run: Attached, since: float) -> float:
    """Seconds from a moment (Unix) to the first step after it, waited for."""
    run.until(lambda: any(line["time"] > since for line in run.steps()), 300)
    return min(line["time"] for line in run.steps() if line["time"] > since) - since


def bucket_cut_off(folder: Path) -> Cut:
    """From the first commit in it until the alarm was told."""
    with pytest.MonkeyPatch.context() as environ, link_to_a_second_machine(3) as link:
        moments: list[float] = []

        def strike(program: Program) -> None:
            moments.append(time.time())
            link.up = False
            assert wait_until(lambda: "mirror_failing" in kinds(folder / "run"), 120)
            time.sleep(MOMENT_S)
            link.up = True
            moments.append(time.time())

        with s3_server(environ, link.listen()) as (root, _):
            settings = (f"{MIRRORED}{root}/row-12", "checkpoint.mirror_timeout_s=4")
            chaos = struck(
                folder,
                strike,
                *settings,
                environment={"TREADLE_FAILPOINTS": "learner.before_step[1]=sleep:7@*"},
                when="mirror.json",
            )
    cut_s, healed_s = moments
    [recovered] = chaos.events("mirror_recovered")
    assert summary_of(chaos.folder)["mirror"]["complete"]
    made = [line for line in chaos.times() if cut_s < line < healed_s]
    return Cut(
        folder=chaos.folder,
        after_heal_s=recovered["time"] - healed_s,
        figures={"steps made while the bucket was away": len(made)},
    )


STEPS_PER_SPEED = 6
SPEEDS = {"as fast as it goes": 0.0, "1 MB/s": 1e6, "0.3 MB/s": 3e5}
LARGER = tuple(
    f"stages.rl.{setting}"
    for setting in (
        "model.layers=2",
        "model.hidden=128",
        "model.intermediate=512",
        "staleness=1",
        f"steps={len(SPEEDS) * STEPS_PER_SPEED + 1}",
    )
)
"""Two megabytes of weights per version, and engines that may be one version behind."""
GROWTH_MIB = 64


def test_row_13_weights_go_over_a_slow_network(tmp_path: Path) -> None:
    """The run becomes as slow as its link, and nothing else: no sample is too old, and no version piles up."""
    resident: dict[str, dict[str, int]] = {}
    with link_to_a_second_machine(4) as link, cluster_over([link]) as cluster:
        with attached(
            tmp_path, cluster, *ENGINES_THERE, *LARGER, "checkpoint.every_steps=100", when="metrics.jsonl"
        ) as run:
            for at, (speed, bytes_per_s) in enumerate(SPEEDS.items()):
                link.slow(bytes_per_s)
                run.reaches(1 + (at + 1) * STEPS_PER_SPEED)
                resident[speed] = resident_mib(cluster)
            link.slow(0)
            run.end()
        lines = run.steps()
    found = account(run.folder, staleness=1)
    grown = {
        title: resident["0.3 MB/s"][title] - mib for title, mib in resident["as fast as it goes"].items()
    }
    figures: dict[str, float | int | str] = {
        "megabytes per version": round(lines[-1]["metrics"]["weights/dense_bytes"] / 1e6, 1)
    }
    for at, speed in enumerate(SPEEDS):
        # The step in which the speed changes belongs to none.
        of_speed = [
            line["metrics"] for line in lines[2 + at * STEPS_PER_SPEED : 1 + (at + 1) * STEPS_PER_SPEED]
        ]
        seconds = statistics.median(one["timing_s/step"] for one in of_speed)
        figures[f"step s, {speed}"] = round(seconds, 2)
        figures[f"trained tokens/s, {speed}"] = round(
            statistics.median(one["perf/tokens"] for one in of_speed) / seconds, 1
        )
        figures[f"fetching s, {speed}"] = round(
            statistics.median(one["weights/wire_s"] for one in of_speed), 2
        )
    oldest = max(line["metrics"]["staleness/max"] for line in lines)
    write_row(
        Row(
            row=13,
            fault=f"the link between learner and engines carries {', '.join(SPEEDS)}",
            account=found,
            figures={
                **figures,
                "largest staleness trained": oldest,
                "most grown process MiB": max(grown.values()),
            },
        )
    )
    assert clean(found), found
    assert oldest <= 1
    assert summary_of(run.folder)["replacements"] == {}
    assert summary_of(run.folder)["recoveries"] == 0
    assert figures["fetching s, 0.3 MB/s"] > 3 * figures["fetching s, as fast as it goes"], (
        "the link was not the limit"
    )
    assert max(grown.values()) < GROWTH_MIB, grown


def resident_mib(cluster: RunningCluster) -> dict[str, int]:
    """Memory of every role process, and of the processes that hold objects."""
    found = {}
    for node in cluster.nodes:
        for title in ("ray::RolloutActor", "ray::LearnerRankActor", "ray::CoordinatorActor", "raylet"):
            for process in family(node, title):
                found[f"{title} {process.pid}"] = process.memory_info().rss // 2**20
    return found
