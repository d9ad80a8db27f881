"""Rows 23 and 24: MLflow goes away, and nobody watches."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.benchmarks.bench_outage import run_with_outages, turns
from tests.chaos.book import Row, write_row
from tests.chaos.runs import account, clean, events_of
from tests.e2e.programs import summary_of

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.ray,
    pytest.mark.deepspeed,
    pytest.mark.mlflow,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]


def test_row_23_mlflow_is_away_and_the_run_loses_neither_time_nor_metrics(tmp_path: Path) -> None:
    """How much time: `tests.benchmarks.bench_outage` in long stretches; here it is written down and not judged."""
    outages = run_with_outages(tmp_path, turns(1), 60)
    found = account(outages.folder)
    told = summary_of(outages.folder)["mlflow"]
    write_row(
        Row(
            row=23,
            fault="MLflow refuses connections, answers 30 s late, with 500, with 401",
            account=found,
            figures={
                "step time, away over there": round(outages.ratio, 3),
                "calm stretches over each other": round(outages.noise, 3),
                "metrics": outages.metrics,
                "metrics missing in MLflow": outages.missing,
                "metrics twice in MLflow": outages.doubled,
            },
        )
    )
    assert clean(found), found
    assert (outages.missing, outages.doubled) == (0, 0)
    assert outages.metrics > 1000
    away = events_of(outages.folder, "mlflow_away")
    assert away, "nothing was said"
    assert "Connection refused" in away[0]["message"]
    assert told["outages"] or told["now"], "retries are up to 30 s apart: outages may look like one"
