"""Row 25: a process takes more memory than its node has."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.chaos.attached import attached
from tests.chaos.book import Row, write_row
from tests.chaos.runs import PATIENT, account, clean, events_of, same_bits
from tests.chaos.small_memory import possible, small_memory
from tests.clusters import Node, cluster_of
from tests.e2e.programs import TINY, WITH_PROMPTS, Program, patiently, samples_of

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.ray,
    pytest.mark.deepspeed,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]

LIMIT_MIB, THRESHOLD = 6000, 0.65
TOO_MUCH_MIB = 2800
"""With what the roles take, more than Ray allows, and less than the node has."""
FAR_TOO_MUCH_MIB = 2 * LIMIT_MIB
NEVER_MIB = 2**33
"""More than any machine gives."""
WORDS = "ran out of memory"
needs_small_memory = pytest.mark.skipif(
    not possible(), reason="needs root, unshare, and memory control groups (version 1)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhausted:
    """A run in which processes took too much, and what was said about those that had to be replaced."""

    folder: Path
    causes: tuple[str, ...]
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
        seconds=tuple(min(time for time in made if time > at) - at for at in struck),
        killed_by_kernel=killed_by_kernel,
    )


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
    bits = all(same_bits(one.folder, undisturbed) for one in (by_ray, by_kernel))
    write_row(
        Row(
            row=25,
            fault="an engine and a rank take too much memory: Ray ends processes, and so does the kernel",
            seconds=seconds,
            account=accounts[0],
            same_bits=bits,
            figures={
                "processes ended by Ray": len(by_ray.causes),
                "by the kernel": by_kernel.killed_by_kernel,
                "told as a lack of memory": sum(WORDS in cause for cause in causes),
                "told as something else": sum(WORDS not in cause for cause in causes),
            },
        )
    )
    assert all(map(clean, accounts)), accounts
    assert bits
    assert samples_of(by_ray.folder) == samples_of(by_kernel.folder) == samples_of(undisturbed)
    assert by_ray.causes
    assert all(WORDS in cause for cause in causes), causes
    assert (by_ray.killed_by_kernel, by_kernel.killed_by_kernel) == (0, 2)


@pytest.mark.parametrize(
    ("fault", "helps"),
    [
        (f"rollout.mid_generation=allocate:{NEVER_MIB}@*", "Lower rollout.slots"),
        (f"learner.after_backward=allocate:{NEVER_MIB}@*", "Lower learner.max_tokens_per_microbatch"),
    ],
)
def test_row_25_memory_that_is_never_enough_stops_the_run_with_what_helps(
    tmp_path: Path, fault: str, helps: str
) -> None:
    """No storm: the budgets of replacements and recoveries hold."""
    program, ended = patiently(
        *("run", str(TINY), WITH_PROMPTS, "rollout.max_restarts=2", "--dir", str(tmp_path / "run")),
        TREADLE_FAILPOINTS=fault,
    )
    assert ended.code == 1, ended
    assert WORDS in ended.complaint
    assert "MemoryError" in ended.complaint
    assert helps in ended.complaint
    assert len(events_of(tmp_path / "run", "replaced")) <= 2
    assert len(events_of(tmp_path / "run", "recovery")) <= 2
    assert program.all_gone(), program.survivors()
