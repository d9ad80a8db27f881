"""What must hold of a run whatever has happened to it, from its ledger, its weights and its events."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from treadle.platform.ledger import Ledger
from treadle.platform.metric_names import MISMATCH_MAX
from treadle.platform.tracking import read_events, read_metrics
from treadle.platform.tracking.spool import METRICS_FILE, metric_rows, read_lines
from treadle.workflows.configs import GrpoConfig
from treadle.workflows.folder import RunFolder, read_json
from treadle.workflows.recipe import load_recipe
from treadle.workflows.recovering import RECOVERY
from treadle.workflows.run import REPLACED


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What became of a run's groups and weights; all must be 0 but `issued`.

    `mixed`: trained groups that two versions drew though the stage allows one (η=0). `stale`: trained groups older than
    η. `poisoned`: tensors of exported weights with a NaN or an infinity, and comparisons of engine and learner that
    came to no finite figure.
    """

    issued: int
    lost: int
    doubled: int
    mixed: int
    stale: int
    poisoned: int


def account(folder: Path) -> Account:
    """The invariants of a run that has ended. Groups in flight are lost, unless it was stopped and can be continued."""
    run = RunFolder(folder)
    mixed = stale = 0
    with Ledger.open(run.ledger, read_only=True) as ledger:
        audit = ledger.audit()
        for name, stage in load_recipe(run.config).stages.items():
            if isinstance(stage, GrpoConfig):
                drawn = ledger.versions_trained(name)
                mixed += sum(oldest != newest for _, oldest, newest in drawn) if not stage.staleness else 0
                stale += sum(step - oldest > stage.staleness for step, oldest, _ in drawn)
    over = run.state().get("state") == "finished"
    figures = [row.metrics.get(MISMATCH_MAX, 0.0) for row in read_metrics(folder)]
    return Account(
        issued=audit.issued,
        lost=audit.lost + (audit.in_flight if over else 0),
        doubled=audit.doubled,
        mixed=mixed,
        stale=stale,
        poisoned=not_finite(folder) + sum(not math.isfinite(figure) for figure in figures),
    )


def clean(found: Account) -> bool:
    """Whether every invariant holds."""
    return not (found.lost or found.doubled or found.mixed or found.stale or found.poisoned)


def not_finite(folder: Path) -> int:
    """Tensors of the exported weights with a NaN or an infinity."""
    bad = 0
    for file in (folder / "artifacts").rglob("*.safetensors"):
        with safe_open(str(file), "pt") as tensors:
            bad += sum(not bool(tensors.get_tensor(name).isfinite().all()) for name in tensors.keys())  # noqa: SIM118
    return bad


def digest_of(folder: Path) -> str:
    """Of the weights that a finished run has trained last."""
    return str(read_json(RunFolder(folder).summary)["weights_digest"])


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Fields of all events of a kind, with their time (Unix seconds)."""
    return [{**row.fields, "time": row.time} for row in read_events(folder) if row.kind == kind]


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of the values do not exceed, interpolated; None for no values."""
    if not values:
        return None
    if len(values) == 1:
        return round(values[0], 3)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return round(cuts[round(share * 100) - 1], 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recoveries:
    """When a run has mended itself and made steps (Unix seconds)."""

    replaced: Sequence[tuple[float, str]]
    rolled_back: Sequence[float]
    steps: Sequence[float]

    @classmethod
    def of(cls, folder: Path) -> Recoveries:
        return cls(
            replaced=[(event["time"], event["role"]) for event in events_of(folder, REPLACED)],
            rolled_back=[event["time"] for event in events_of(folder, RECOVERY)],
            steps=[row.time for row in metric_rows(read_lines(folder / METRICS_FILE).records)],
        )

    def after(self, role: str, at: float, *, ended: bool) -> tuple[float, str] | None:
        """From a fault of a role to the first sign that it is mended: a successor or new ranks where a process has
        `ended`, else (and of the driver) the next step. None where none came."""
        role = {"broadcast": "coordinator"}.get(role, role)
        signs = {
            "successor": [time for time, of in self.replaced if ended and of == role],
            "new ranks": self.rolled_back if ended and role == "learner" else [],
            "next step": self.steps,
        }
        for sign, times in signs.items():
            if later := [time for time in times if time >= at]:
                return round(min(later) - at, 3), sign
        return None
