"""Row 25: a process takes more memory than its node has."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.chaos.attached import attached
from tests.chaos.book import Row, write_row
from tests.chaos.runs import PATIENT, WHOLE_RUN, account, clean, events_of, same_bits
from tests.chaos.small_memory import possible, small_memory
from tests.clusters import Node, cluster_of
from tests.e2e.programs import TINY, WITH_PROMPTS, Program, patiently, samples_of, summary_of

pytestmark = WHOLE_RUN

LIMIT_MIB, THRESHOLD = 6000, 0.65
TOO_MUCH_MIB = 2800
"""With what the roles take, more than Ray allows, and less than the node has."""
FAR_TOO_MUCH_MIB = 2 * LIMIT_MIB
NEVER_MIB = 2**33
"""More than any machine gives."""
WORDS = "ran out of memory"
ROUNDING = 1e-5
LONGEST_TOKENS = 32
"""Of the tiny recipe: `rollout.max_context_tokens`."""
needs_small_memory = pytest.mark.skipif(
    not possible(), reason="needs root, unshare, and memory control groups (version 1)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhausted:
    """A run in which processes took too much, and what was said about those that had to be replaced."""

    folder: Path
    causes: tuple[str, ...]
    lowered: tuple[dict[str, Any], ...]
    """The settings that went down, as told."""
    seconds: tuple[float, ...]
    killed_by_kernel: int


def exhausted(folder: Path, once: Path, killed_by_kernel: int) -> Exhausted:
    told = [*events_of(folder, "replaced"), *events_of(folder, "recovery")]
    made = sorted(json.loads(line)["time"] for line in (folder / "metrics.jsonl").read_text().splitlines())
    struck = [file.stat().st_mtime for file in once.glob("*=allocate@*")]
    assert len(struck) == 2, sorted(file.name for file in once.iterdir())
    return Exhausted(
        folder=folder,
        causes=tuple(event["message"] for event in told),
        lowered=tuple(events_of(folder, "oom_backoff")),
        seconds=tuple(min(time for time in made if time > at) - at for at in struck),
        killed_by_kernel=killed_by_kernel,
    )


def farthest(folder: Path, undisturbed: Path) -> float:
    """The largest difference of a weight from the undisturbed run's: smaller micro-batches round otherwise."""
    ours, theirs = (load_file(one / "artifacts/rl/model.safetensors") for one in (folder, undisturbed))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def ended_by_ray(folder: Path) -> Exhausted:
    """Engines and ranks on nodes of their own, whose memory Ray watches. Whom it ends is its own choice."""
    once = folder / "once"
    faults = (
        f"rollout.mid_generation=allocate:{TOO_MUCH_MIB}@9;learner.before_step[1]=allocate:{TOO_MUCH_MIB}@5"
    )
    environment = {
        "RAY_memory_usage_threshold": str(THRESHOLD),
        "TREADLE_FAILPOINTS": f"{faults};learner.before_step[0]=sleep:1@*",
        "TREADLE_FAILPOINTS_ONCE": str(once),
    }
    with ExitStack() as stack:
        memories = [stack.enter_context(small_memory(LIMIT_MIB)) for _ in range(2)]
        nodes = [
            Node(cpus=3, within=memory.within, labels={"ray.io/accelerator-type": accelerator})
            for memory, accelerator in zip(memories, ("H100", "A100"), strict=True)
        ]
        cluster = stack.enter_context(cluster_of(Node(cpus=1), *nodes, **environment))
        words = ("rollout.accelerator=H100", "learner.accelerator=A100")
        run = stack.enter_context(attached(folder, cluster, *words))
        run.end()
        return exhausted(run.folder, once, sum(memory.kills() for memory in memories))


def ended_by_the_kernel(folder: Path) -> Exhausted:
    """All on one node, without Ray's watch."""
    once, faults = folder / "once", f"allocate:{FAR_TOO_MUCH_MIB}"
    folder.mkdir()
    with small_memory(LIMIT_MIB) as memory:
        program = Program(
            words=("run", str(TINY), WITH_PROMPTS, *PATIENT, "--dir", str(folder / "run")),
            environment={
                "RAY_memory_monitor_refresh_ms": "0",
                "TREADLE_FAILPOINTS": f"rollout.mid_generation[rollout-1]={faults}@9;learner.before_step[1]={faults}@5",
                "TREADLE_FAILPOINTS_ONCE": str(once),
            },
        )
        process = program.start()
        memory.take(process.pid)
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, (out, err)
        assert program.all_gone(), program.survivors()
        return exhausted(folder / "run", once, memory.kills())


@needs_small_memory
def test_row_25_processes_take_more_memory_than_their_node_has(tmp_path: Path, undisturbed: Path) -> None:
    by_ray, by_kernel = ended_by_ray(tmp_path / "ray"), ended_by_the_kernel(tmp_path / "kernel")
    causes, seconds = (*by_ray.causes, *by_kernel.causes), (*by_ray.seconds, *by_kernel.seconds)
    accounts = [account(one.folder) for one in (by_ray, by_kernel)]
    rounding = max(farthest(one.folder, undisturbed) for one in (by_ray, by_kernel))
    write_row(
        Row(
            row=25,
            fault="an engine and a rank take too much memory: Ray ends processes, and so does the kernel",
            seconds=seconds,
            account=accounts[0],
            figures={
                "settings lowered": len(by_ray.lowered) + len(by_kernel.lowered),
                "largest difference of a weight": rounding,
                "processes ended by Ray": len(by_ray.causes),
                "by the kernel": by_kernel.killed_by_kernel,
                "told as a lack of memory": sum(WORDS in cause for cause in causes),
                "told as something else": sum(WORDS not in cause for cause in causes),
            },
        )
    )
    assert all(map(clean, accounts)), accounts
    assert rounding <= ROUNDING
    assert samples_of(by_ray.folder) == samples_of(by_kernel.folder) == samples_of(undisturbed)
    assert by_ray.causes
    assert all(WORDS in cause for cause in causes), causes
    assert (by_ray.killed_by_kernel, by_kernel.killed_by_kernel) == (0, 2)
    assert {(one["name"], one["setting"], one["after"]) for one in by_kernel.lowered} >= {
        ("rollout-1", "rollout.slots", 8)
    }
    [ranks] = [one for one in by_kernel.lowered if one["role"] == "learner"]
    assert ranks["setting"] == "learner.max_tokens_per_microbatch"
    assert ranks["after"] == max(ranks["before"] // 2, LONGEST_TOKENS), ranks
    for one in (by_ray, by_kernel):
        assert one.lowered, one.causes
        only_slots = all(event["role"] == "rollout" for event in one.lowered)
        assert not only_slots or same_bits(one.folder, undisturbed)
        told = Counter(event["setting"] for event in one.lowered)
        assert summary_of(one.folder)["oom_backoffs"] == told


@pytest.mark.parametrize(
    ("fault", "held", "helps"),
    [
        (
            f"rollout.mid_generation=allocate:{NEVER_MIB}@*",
            "failed last, with rollout.slots=8.",
            "Lower rollout.slots",
        ),
        (
            f"learner.after_backward=allocate:{NEVER_MIB}@*",
            f"learner.max_tokens_per_microbatch={LONGEST_TOKENS} stays in force for the learner",
            "Set learner.activation_checkpointing=true",
        ),
    ],
)
def test_row_25_memory_that_is_never_enough_stops_the_run_with_what_helps(
    tmp_path: Path, fault: str, held: str, helps: str
) -> None:
    """No storm: the budgets of replacements, recoveries and halvings hold."""
    program, ended = patiently(
        *("run", str(TINY), WITH_PROMPTS, "rollout.max_restarts=2", "--dir", str(tmp_path / "run")),
        TREADLE_FAILPOINTS=fault,
    )
    assert ended.code == 1, ended
    assert WORDS in ended.complaint
    assert "MemoryError" in ended.complaint
    assert held in ended.complaint
    assert "node" in ended.complaint
    assert helps in ended.complaint
    assert events_of(tmp_path / "run", "oom_backoff")
    assert len(events_of(tmp_path / "run", "replaced")) <= 2
    assert len(events_of(tmp_path / "run", "recovery")) <= 4
    assert program.all_gone(), program.survivors()
