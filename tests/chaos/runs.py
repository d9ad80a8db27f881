"""Runs with faults ordered at failpoints, and what their ledger, samples and weights say afterwards."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
from safetensors import safe_open
from tests.chaos.book import Account
from tests.e2e.programs import TINY, WITH_PROMPTS, Ended, Program, patiently, summary_of, wait_until

from treadle.platform.metric_names import MISMATCH_MAX

COMMIT = "checkpoints/rl/step-00000002/COMMITTED"
"""The first commit of the tiny recipe."""
PATIENT = (
    "recovery.max_recoveries=40",
    "rollout.max_restarts=40",
    "broadcast.max_restarts=40",
    "verify.respawns=40",
)
"""The suite is a restart storm; what caps storms has tests of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chaos:
    """A run that has ended, and when each of its faults happened (Unix seconds, by the fault's label)."""

    folder: Path
    ended: Ended
    faults: dict[str, float]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Fields of all events of a kind, with their time."""
        return events_of(self.folder, kind)

    def recoveries_s(self, role: str) -> list[float]:
        """From each fault to the end of the replacement that came after it."""
        kinds = {"learner": "recovery"}
        ends = sorted(
            e["time"] for e in self.events(kinds.get(role, "replaced")) if e.get("role", role) == role
        )
        return [
            min(end for end in ends if end >= at) - at
            for at in self.faults.values()
            if ends and ends[-1] >= at
        ]

    def metrics(self, name: str) -> list[float]:
        """A figure of every step that has it."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line["metrics"][name] for line in lines if name in line["metrics"]]

    def times(self) -> list[float]:
        """When each step was made (Unix seconds), redone ones included."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return sorted(line["time"] for line in lines)

    def steps_resumed_s(self) -> list[float]:
        """From each fault to the next step that was made, redone work included."""
        times = self.times()
        return [min(t for t in times if t >= at) - at for at in self.faults.values() if times[-1] >= at]


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Fields of all events of a kind, with their time (Unix seconds)."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [{**line["fields"], "time": line["time"]} for line in lines if line["kind"] == kind]


def mixed_and_stale(folder: Path, staleness: int = 0) -> tuple[int, int]:
    """Kept samples that two versions drew (counted at η=0 only), and those older than η allows."""
    files = sorted((folder / "rollouts").glob("*.parquet"))
    rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    assert rows, "the run kept no samples"
    mixed = sum(row["version_oldest"] != row["version_newest"] for row in rows) if not staleness else 0
    return mixed, sum(row["step"] - row["version_oldest"] > staleness for row in rows)


def chaotic(
    folder: Path,
    *faults: str,
    settings: tuple[str, ...] = (),
    once: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Chaos:
    """A run of the tiny recipe in which each fault happens once in all processes together (or, with `once` off, in
    every process that gets to it). The run must end well, and so must all of its processes."""
    told = folder / "once"
    told.mkdir(parents=True)
    around = dict(environment or {})
    if faults:
        around["TREADLE_FAILPOINTS"] = ";".join(faults)
    if once:
        around["TREADLE_FAILPOINTS_ONCE"] = str(told)
    words = ("run", str(TINY), WITH_PROMPTS, *PATIENT, *settings, "--dir", str(folder / "run"))
    program, ended = patiently(*words, **around)
    assert ended.code == 0, ended
    assert program.all_gone(), program.survivors()
    happened = {file.name: file.stat().st_mtime for file in told.iterdir()}
    assert not once or len(happened) == len(faults), f"ordered {faults}, happened {sorted(happened)}"
    return Chaos(folder=folder / "run", ended=ended, faults=happened)


def struck(
    folder: Path,
    strike: Callable[[Program], None],
    *settings: str,
    environment: Mapping[str, str] | None = None,
    when: str = COMMIT,
) -> Chaos:
    """A run of the tiny recipe to which `strike` happens once the file `when` is in its folder. The run must end well,
    and so must all of its processes."""
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "run"
    words = ("run", str(TINY), WITH_PROMPTS, *PATIENT, *settings, "--dir", str(run))
    program, began = Program(words=words, environment=environment or {}), time.monotonic()
    with (folder / "said.log").open("w+") as log:
        process = program.start_into(log)
        try:
            assert wait_until(lambda: (run / when).exists() or process.poll() is not None, 900)
            struck_s = time.time()
            if process.poll() is None:
                strike(program)
            code = process.wait(900)
        except BaseException:
            process.kill()
            raise
        said = (folder / "said.log").read_text()
    ended = Ended(code=code, out=said, err=said, wall_s=time.monotonic() - began)
    assert ended.code == 0, ended
    assert program.all_gone(), program.survivors()
    return Chaos(folder=run, ended=ended, faults={"strike": struck_s})


def first_step_after(folder: Path, since: float) -> float:
    """Seconds from a moment (Unix) to the first step that was made after it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return min(line["time"] for line in lines if line["time"] > since) - since


def account(folder: Path, *, staleness: int = 0) -> Account:
    """The invariants of a finished run, from the ledger, the kept samples and the exported weights."""
    samples = summary_of(folder)["samples"]
    mixed, stale = mixed_and_stale(folder, staleness)
    return Account(
        issued=samples["issued"],
        lost=samples["lost"] + samples["in_flight"],
        doubled=samples["doubled"],
        mixed=mixed,
        stale=stale,
        poisoned=not_finite(folder) + sum(not finite for finite in _figures(folder)),
    )


def not_finite(folder: Path) -> int:
    """Tensors of the exported weights with a NaN or an infinity."""
    bad = 0
    for file in (folder / "artifacts").rglob("*.safetensors"):
        with safe_open(str(file), "pt") as tensors:
            bad += sum(not bool(tensors.get_tensor(name).isfinite().all()) for name in tensors.keys())  # noqa: SIM118
    return bad


def _figures(folder: Path) -> list[bool]:
    """Whether engine and learner agreed at each comparison with a finite figure."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [math.isfinite(line["metrics"].get(MISMATCH_MAX, 0.0)) for line in lines]


def clean(found: Account) -> bool:
    """Whether every invariant holds."""
    return not (found.lost or found.doubled or found.mixed or found.stale or found.poisoned)


def same_bits(folder: Path, undisturbed: Path) -> bool:
    return bool(summary_of(folder)["weights_digest"] == summary_of(undisturbed)["weights_digest"])
