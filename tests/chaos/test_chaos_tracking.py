"""Rows 23 and 24: MLflow goes away, and nobody watches."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tests.benchmarks.bench_outage import run_with_outages, turns
from tests.chaos.book import Row, write_row
from tests.chaos.runs import WHOLE_RUN, account, clean, events_of, same_bits, struck
from tests.e2e.programs import Program, samples_of, summary_of

pytestmark = [*WHOLE_RUN, pytest.mark.mlflow]


def test_row_23_mlflow_is_away_and_the_run_loses_neither_time_nor_metrics(tmp_path: Path) -> None:
    """How much time: `tests.benchmarks.bench_outage` in long stretches; here it is written down and not judged."""
    outages = run_with_outages(tmp_path, turns(1), 60)
    found = account(outages.folder)
    ratio, error = outages.ratio_and_error
    told = summary_of(outages.folder)["mlflow"]
    write_row(
        Row(
            row=23,
            fault="MLflow refuses connections, answers 30 s late, with 500, with 401",
            account=found,
            figures={
                "step time, away over there": round(ratio, 3),
                "its standard error": round(error, 3),
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


def test_row_24_the_dashboard_dies_and_prometheus_never_was(tmp_path: Path, undisturbed: Path) -> None:
    """Without a dashboard at all: every other test. Nothing scrapes the figures in any of them."""
    ended: list[int] = []

    def strike(program: Program) -> None:
        of_dashboard = [line for line in program.survivors() if "dashboard/dashboard.py" in line]
        for line in of_dashboard:
            ended.append(int(line.split()[0]))
            os.kill(ended[-1], signal.SIGKILL)

    chaos = struck(tmp_path, strike, "cluster.dashboard=true")
    found = account(chaos.folder)
    write_row(
        Row(
            row=24,
            fault="kill -9 of Ray's dashboard; no Prometheus, no Grafana",
            seconds=chaos.steps_resumed_s(),
            account=found,
            same_bits=same_bits(chaos.folder, undisturbed),
            figures={"processes of the dashboard killed": len(ended)},
        )
    )
    assert ended, "there was no dashboard"
    assert clean(found), found
    assert same_bits(chaos.folder, undisturbed)
    assert samples_of(chaos.folder) == samples_of(undisturbed)
    assert summary_of(chaos.folder)["replacements"] == {}
    assert summary_of(chaos.folder)["recoveries"] == 0
