"""What every benchmark shares: statistics, rows of `bench.json`, one table, child processes."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

COLUMNS = ("name", "ours", "theirs", "ratio", "unit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison. `ratio` is ours over theirs; whether small or large is good, `unit` tells.

    Example: `Row(name="step, demo", ours=0.4, theirs=0.5, ratio=0.8, unit="s per step", hardware="2 x …",
    command="python -m tests.benchmarks.bench_step", measured="2027-01-05", detail="…")`.
    """

    name: str
    ours: float
    theirs: float
    ratio: float
    unit: str
    hardware: str
    command: str
    measured: str
    """UTC, to the minute."""
    detail: str = ""
    """What a reader must know to judge the figures."""


def compared(name: str, ours: float, theirs: float, unit: str, *, command: str, detail: str = "") -> Row:
    """A row with its ratio, hardware and time filled in. Raises `ValueError` where nothing was measured."""
    if not (math.isfinite(ours) and math.isfinite(theirs) and theirs > 0):
        raise ValueError(f"{name}: {ours} against {theirs} {unit} is no comparison.")
    return Row(
        name=name,
        ours=_rounded(ours),
        theirs=_rounded(theirs),
        ratio=_rounded(ours / theirs),
        unit=unit,
        hardware=hardware(),
        command=command,
        measured=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        detail=detail,
    )


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a JSON list, replacing those of the same name."""
    names = {row.name for row in rows}
    held = [row for row in read_rows(path) if row["name"] not in names]
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps([*held, *(asdict(row) for row in rows)], indent=1) + "\n")
    draft.replace(path)


def read_rows(path: Path) -> list[dict[str, object]]:
    """The rows of a file; none if there is no file."""
    rows: list[dict[str, object]] = json.loads(path.read_text()) if path.exists() else []
    return rows


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] = COLUMNS) -> str:
    """Rows as text with aligned columns; numbers to the right."""
    cells = [list(columns), *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [bool(rows) and all(isinstance(row.get(c), int | float) for row in rows) for c in columns]
    lines = [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """`median [quartile, quartile] of n`, for a column of timings."""
    if len(values) < 2:
        return f"{values[0]:.3f} of 1" if values else "none"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} [{low:.3f}, {high:.3f}] of {len(values)}"


def against_neighbours(medians: Sequence[float], treated: Sequence[bool]) -> tuple[float, float]:
    """How stretches of one kind compare with the stretches before and after them, which take part in the machine's
    drift: the geometric mean of the ratios to the mean of both neighbours, and its standard error. Stretches at either
    end must be untreated, and no two treated ones may be neighbours. Raises `ValueError` for fewer than two."""
    at = [index for index, yes in enumerate(treated) if yes]
    if len(at) < 2 or treated[0] or treated[-1] or any(b - a < 2 for a, b in itertools.pairwise(at)):
        raise ValueError(
            f"{len(at)} treated stretches of {len(treated)} do not alternate with untreated ones."
        )
    ratios = [2 * medians[index] / (medians[index - 1] + medians[index + 1]) for index in at]
    ratio = statistics.geometric_mean(ratios)
    return ratio, ratio * statistics.stdev(map(math.log, ratios)) / math.sqrt(len(ratios))


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is NaN for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def lengths_line(lengths: Sequence[int], limit: int) -> str:
    """A length distribution in one line."""
    deciles = statistics.quantiles(lengths, n=10, method="inclusive")
    cut = sum(n >= limit for n in lengths) / len(lengths)
    return (
        f"tokens per completion: mean {statistics.fmean(lengths):.1f}, p10 {deciles[0]:.0f}, p50 {deciles[4]:.0f}, "
        f"p90 {deciles[8]:.0f}, max {max(lengths)}, at the limit {cut:.1%} (n {len(lengths)})"
    )


def hardware() -> str:
    """Cores, processor and the load of the last minute: figures from a busy machine must be recognisable."""
    return f"{os.cpu_count()} x {_processor()}, load {os.getloadavg()[0]:.1f}"


def run_child(
    module: str, arguments: Sequence[str], *, log: Path, deadline_s: float, **environment: str
) -> None:
    """Runs `python -m module` in this process group and waits. Raises `RuntimeError` with the log's end if it fails
    or is late; a late one is asked to end, so that it can end what it has started."""
    run_command([sys.executable, "-m", module, *arguments], log=log, deadline_s=deadline_s, **environment)


def run_command(command: Sequence[str], *, log: Path, deadline_s: float, **environment: str) -> None:
    """Like `run_child`, for any command."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
        try:
            code = child.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{_named(command)} took over {deadline_s:.0f} s.\n{_tail(log)}") from None
        finally:
            _end(child)
    if code:
        raise RuntimeError(f"{_named(command)} ended with {code}; {log}:\n{_tail(log)}")


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(60)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _named(command: Sequence[str]) -> str:
    return " ".join(command[1:4])


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-25:])


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else "unknown processor"


class Stopwatch:
    """Seconds between calls, on the monotonic clock."""

    def __init__(self) -> None:
        self._since_s = time.monotonic()

    def lap(self) -> float:
        now_s = time.monotonic()
        lap_s, self._since_s = now_s - self._since_s, now_s
        return lap_s
