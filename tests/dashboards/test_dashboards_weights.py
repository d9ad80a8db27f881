"""The report's table of publications."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from treadle.dashboards.report import write_report
from treadle.dashboards.weights import size, weights_of
from treadle.platform import metric_names as names
from treadle.platform.tracking import MetricRow


def row(step: int, **changes: float) -> MetricRow:
    metrics = {
        names.WEIGHTS_DENSE_BYTES: 8.0e6,
        names.WEIGHTS_SENT_BYTES: 8.0e6 if step == 0 else 5.0e5,
        names.WEIGHTS_REFUSED: 1.0,
        names.WEIGHTS_GATHER_S: 0.1 * (step + 1),
        names.WEIGHTS_ENCODE_S: 0.2,
        names.WEIGHTS_WIRE_S: 0.3,
        names.WEIGHTS_APPLY_S: 0.4,
        names.weights_lag("rollout-0"): 0.0,
        names.weights_lag("rollout-1"): float(step % 2),
        **({names.WEIGHTS_DENSITY: 0.0171, names.WEIGHTS_DENSITY_NORM: 0.002} if step else {}),
        **changes,
    }
    return MetricRow(stage="rl", step=step, time=float(step), attempt=1, elapsed_s=0.0, metrics=metrics)


def test_bytes_add_up_and_seconds_are_means() -> None:
    found = weights_of("rl", [row(0), row(1), row(2)])
    assert found is not None
    assert (found.publications, found.dense, found.sent, found.smaller) == (3, "24 MB", "9 MB", "2.7 ×")
    assert found.refused == "3"
    assert found.seconds == ("0.2", "0.2", "0.3", "0.4")
    assert found.densities == (("all", "1.71 %"), ("norm", "0.20 %"))
    assert found.lags == (("rollout-0", "0"), ("rollout-1", "1"))


def test_a_stage_without_engines_has_no_row() -> None:
    plain = MetricRow(stage="sft", step=0, time=0.0, attempt=1, elapsed_s=0.0, metrics={"policy/loss": 1.0})
    assert weights_of("sft", [plain]) is None
    assert weights_of("sft", []) is None


@pytest.mark.parametrize(
    ("count", "told"), [(0.0, "0 B"), (999.0, "999 B"), (1.7e6, "1.7 MB"), (2.5e9, "2.5 GB"), (61e3, "61 kB")]
)
def test_sizes_are_told_in_the_largest_unit(count: float, told: str) -> None:
    assert size(count) == told


def test_the_page_shows_the_table_and_says_where_there_is_none(tmp_path: Path) -> None:
    assert "no version was published to engines" in write_report(tmp_path).read_text()
    lines = [json.dumps(asdict(r)) for r in (row(0), row(1))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = write_report(tmp_path).read_text()
    for text in ("16 MB", "8.5 MB", "1.9 ×", "encode s", "1.71 %", "rollout-1"):
        assert text in page
    assert "no version was published to engines" not in page
