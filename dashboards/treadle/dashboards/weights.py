"""The report's table of publications: what travelled, how much of it was needed, and where the time went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from treadle.dashboards.charts import figure
from treadle.platform import metric_names as names
from treadle.platform.tracking import MetricRow

_SECONDS = (
    (names.WEIGHTS_GATHER_S, "gather"),
    (names.WEIGHTS_ENCODE_S, "encode"),
    (names.WEIGHTS_WIRE_S, "wire"),
    (names.WEIGHTS_APPLY_S, "apply"),
)
_DENSITIES = (
    (names.WEIGHTS_DENSITY, "all"),
    (names.WEIGHTS_DENSITY_EMBEDDING, "embedding"),
    (names.WEIGHTS_DENSITY_ATTENTION, "attention"),
    (names.WEIGHTS_DENSITY_MLP, "mlp"),
    (names.WEIGHTS_DENSITY_NORM, "norm"),
    (names.WEIGHTS_DENSITY_HEAD, "head"),
    (names.WEIGHTS_DENSITY_OTHER, "other"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsRow:
    """A stage's publications: totals of bytes and fetches, means of seconds, and the share of elements that changed.
    `densities` and `lags` are pairs of a label and a figure."""

    stage: str
    publications: int
    dense: str
    sent: str
    smaller: str
    refused: str
    seconds: tuple[str, ...]
    densities: tuple[tuple[str, str], ...]
    lags: tuple[tuple[str, str], ...]


SECONDS = tuple(label for _, label in _SECONDS)
"""The columns of seconds."""


def weights_of(stage: str, rows: Sequence[MetricRow]) -> WeightsRow | None:
    """The row of a stage; None where nothing was published."""
    published = [row.metrics for row in rows if names.WEIGHTS_DENSE_BYTES in row.metrics]
    if not published:
        return None

    def values(name: str) -> list[float]:
        return [metrics[name] for metrics in published if math.isfinite(metrics.get(name, math.nan))]

    def total(name: str) -> float:
        return sum(values(name))

    def mean(name: str) -> str:
        found = values(name)
        return figure(sum(found) / len(found)) if found else "–"

    dense, sent = total(names.WEIGHTS_DENSE_BYTES), total(names.WEIGHTS_SENT_BYTES)
    engines = sorted(
        {name for metrics in published for name in metrics if name.startswith(names.WEIGHTS_LAG_PREFIX)}
    )
    return WeightsRow(
        stage=stage,
        publications=len(published),
        dense=size(dense),
        sent=size(sent),
        smaller=f"{dense / sent:.1f} ×" if sent else "–",
        refused=figure(total(names.WEIGHTS_REFUSED)),
        seconds=tuple(mean(name) for name, _ in _SECONDS),
        densities=tuple(
            (label, f"{100 * values(name)[-1]:.2f} %") for name, label in _DENSITIES if values(name)
        ),
        lags=tuple(
            (engine.removeprefix(names.WEIGHTS_LAG_PREFIX), figure(max(values(engine)))) for engine in engines
        ),
    )


def size(count: float) -> str:
    """Bytes in the largest unit that leaves at least one of it. Example: `size(1.7e6)` is `1.7 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{figure(count / factor)} {unit}"
    return f"{figure(count)} B"
