"""The spool: what survives a torn line, a full disk, a rollback."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from treadle.platform.errors import StorageError
from treadle.platform.tracking.spool import (
    METRICS_FILE,
    MetricRow,
    SpoolWriter,
    current_rows,
    event_rows,
    metric_rows,
    read_lines,
    read_metrics,
)


def _row(stage: str, step: int, attempt: int, **metrics: float) -> MetricRow:
    return MetricRow(stage=stage, step=step, attempt=attempt, time=1.0, elapsed_s=1.0, metrics=metrics)


def _record(step: int, value: float = 0.5, attempt: int = 1) -> dict[str, object]:
    return {
        "stage": "grpo",
        "step": step,
        "attempt": attempt,
        "time": 1.0,
        "elapsed_s": 1.0,
        "metrics": {"reward/mean": value},
    }


def test_a_line_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / METRICS_FILE)
    writer.append(_record(0))
    assert len(read_lines(tmp_path / METRICS_FILE).records) == 1
    writer.close()


def test_a_torn_last_line_is_not_read_and_is_cut_when_the_run_resumes(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    writer = SpoolWriter(path)
    writer.append(_record(0))
    writer.close()
    whole = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"stage": "grpo", "step": 1, "met')
    lines = read_lines(path)
    assert (len(lines.records), lines.next_offset, lines.damaged) == (1, whole, 0)

    resumed = SpoolWriter(path)
    resumed.append(_record(1))
    resumed.close()
    assert [row.step for row in read_metrics(tmp_path)] == [0, 1]
    assert read_lines(path).damaged == 0


def test_a_file_that_is_one_torn_line_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_bytes(b"x" * 200_000)
    SpoolWriter(path).close()
    assert path.read_bytes() == b""


def test_a_damaged_line_in_the_middle_is_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    writer = SpoolWriter(path)
    writer.append(_record(0))
    writer.close()
    with path.open("ab") as file:
        file.write(b"\x00\x00garbage\n")
    writer = SpoolWriter(path)
    writer.append(_record(1))
    writer.close()
    lines = read_lines(path)
    assert lines.damaged == 1
    assert [row.step for row in metric_rows(lines.records)] == [0, 1]


def test_figures_that_are_not_finite_survive_as_valid_json(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / METRICS_FILE)
    writer.append({**_record(0), "metrics": {"a": math.nan, "b": math.inf, "c": -math.inf}})
    writer.close()
    assert b"NaN" not in (tmp_path / METRICS_FILE).read_bytes()
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row.metrics["a"])
    assert (row.metrics["b"], row.metrics["c"]) == (math.inf, -math.inf)


def test_reading_goes_on_from_an_offset_line_by_line(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / METRICS_FILE)
    for step in range(5):
        writer.append(_record(step))
    writer.close()
    seen, offset = [], 0
    while True:
        lines = read_lines(tmp_path / METRICS_FILE, offset, limit=2)
        if not lines.records:
            break
        seen += [record["step"] for record in lines.records]
        offset = lines.next_offset
    assert seen == [0, 1, 2, 3, 4]


def test_lines_of_many_threads_never_mix(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / METRICS_FILE)
    threads = [
        threading.Thread(target=lambda k=k: [writer.append(_record(k * 100 + i)) for i in range(100)])
        for k in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    lines = read_lines(tmp_path / METRICS_FILE)
    assert sorted(int(record["step"]) for record in lines.records) == list(range(800))  # type: ignore[arg-type]
    assert lines.damaged == 0


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from treadle.platform.tracking.spool import SpoolWriter, read_lines
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
writer = SpoolWriter(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for step in range(100):
    writer.append({"step": step, "text": "x" * 40})
assert writer.held > 0 and writer.last_error, (writer.held, writer.last_error)
assert path.stat().st_size <= 1000
before = read_lines(path)
assert before.damaged == 0 and len(before.records) + writer.held == 100
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.append({"step": 100})
assert writer.held == 0 and writer.lost == 0
assert [record["step"] for record in read_lines(path).records] == list(range(101))
"""


def test_a_disk_that_refuses_lines_gets_them_all_later(tmp_path: Path) -> None:
    assert resource.RLIMIT_FSIZE  # the limit acts on the whole process: a child takes it
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path / METRICS_FILE)], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be opened"):
        SpoolWriter(tmp_path / "file" / METRICS_FILE)


def test_after_a_rollback_the_newest_attempt_counts() -> None:
    rows = [_row("grpo", step, 1, r=step) for step in range(10)]
    rows += [_row("grpo", step, 2, r=100 + step) for step in range(7, 9)]
    assert [(row.step, row.attempt) for row in current_rows(rows)] == [
        *((step, 1) for step in range(7)),
        (7, 2),
        (8, 2),
    ]


def test_a_stage_that_was_finished_before_the_resume_keeps_its_rows() -> None:
    rows = [_row("sft", step, 1) for step in range(4)] + [_row("grpo", 0, 1), _row("grpo", 0, 2)]
    assert [(row.stage, row.attempt) for row in current_rows(rows)] == [("sft", 1)] * 4 + [("grpo", 2)]


def test_several_log_calls_of_one_step_are_joined() -> None:
    (row,) = current_rows([_row("grpo", 3, 1, a=1.0, b=1.0), _row("grpo", 3, 1, b=2.0)])
    assert row.metrics == {"a": 1.0, "b": 2.0}


def test_records_of_a_strange_shape_are_left_out_not_fatal() -> None:
    good = _record(1)
    bad = [{}, {**good, "metrics": [1]}, {**good, "step": "x"}, {**good, "metrics": {"a": True}}]
    assert [row.step for row in metric_rows([*bad, good])] == [1]  # type: ignore[list-item]
    assert event_rows([{"kind": "failure"}]) == []


def test_a_closed_spool_forces_its_file_out_and_closes_once(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / METRICS_FILE)
    before = len(os.listdir("/proc/self/fd"))
    writer.close()
    writer.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1
