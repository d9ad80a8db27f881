"""What the chaos suite measures: a line per fault, by row of the failure matrix, kept in chaos.json."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks.bench_rows import hardware, table

from treadle.workflows.gamedays.account import Account, percentile

OUT = "TREADLE_CHAOS_OUT"
"""Names the file; unset, nothing is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the matrix. `seconds` are recoveries, from the fault to the first sign of work after it."""

    row: int
    fault: str
    seconds: Sequence[float] = ()
    budget_s: float | None = None
    account: Account | None = None
    same_bits: bool | None = None
    """Whether the final digest is the undisturbed run's; None where the fault may change it."""
    figures: dict[str, float | int | str] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        told = {key: value for key, value in asdict(self).items() if value is not None}
        return {
            **told,
            "p50_s": percentile(self.seconds, 0.5),
            "p95_s": percentile(self.seconds, 0.95),
            "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            "hardware": hardware(),
        }


def write_row(row: Row) -> None:
    """Adds the fault to the file, in place of an earlier one of the same row. Several processes may write."""
    if not os.environ.get(OUT):
        return
    path = Path(os.environ[OUT])
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        held = {(one["row"], one["fault"]): one for one in rows}
        held[row.row, row.fault] = row.as_json()
        rows = [held[key] for key in sorted(held)]
        path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def main() -> None:
    """Prints the file as a table: `python -m tests.chaos.book`."""
    rows = json.loads(Path(os.environ.get(OUT, "chaos.json")).read_text())["rows"]
    shown = [
        {
            **row,
            **(row.get("account") or {}),
            "faults": len(row["seconds"]),
            "p50_s": "" if row["p50_s"] is None else row["p50_s"],
            "p95_s": "" if row["p95_s"] is None else row["p95_s"],
            "same_bits": row.get("same_bits", ""),
        }
        for row in rows
    ]
    columns = (
        "row",
        "fault",
        "faults",
        "p50_s",
        "p95_s",
        "budget_s",
        "lost",
        "doubled",
        "mixed",
        "stale",
        "poisoned",
    )
    print(table(shown, (*columns, "same_bits")))


if __name__ == "__main__":
    main()
