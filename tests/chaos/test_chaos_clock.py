"""Row 22: the wall clock of every process jumps by an hour, back and forth, in the middle of a run."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path

import pytest
from tests.chaos.book import Row, write_row
from tests.chaos.runs import PATIENT, account, clean, same_bits
from tests.e2e.programs import TINY, WITH_PROMPTS, Program, samples_of, summary_of, wait_until

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.ray,
    pytest.mark.deepspeed,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]

LIBRARIES = [
    Path(folder) / "faketime" / "libfaketimeMT.so.1"
    for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/local/lib")
]
JUMPS = ("+3600", "-3600", "+0")
"""Seconds from the true time. Only the wall clock jumps, as when NTP sets it: monotonic clocks never do."""


def jumped(clock: Path, offset: str) -> None:
    """Sets all wall clocks; processes look at the file every second."""
    draft = clock.with_suffix(".draft")
    draft.write_text(f"{offset}\n")
    os.replace(draft, clock)


def steps_of(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_row_22_the_clock_jumps_by_an_hour_and_nobody_is_late(tmp_path: Path, undisturbed: Path) -> None:
    library = next((path for path in LIBRARIES if path.exists()), None)
    if library is None:
        pytest.skip("libfaketime is not installed (Debian: apt-get install libfaketime)")
    clock, folder = tmp_path / "clock", tmp_path / "run"
    jumped(clock, "+0")
    program = Program(
        words=("run", str(TINY), WITH_PROMPTS, *PATIENT, "--dir", str(folder)),
        environment={
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "TREADLE_FAILPOINTS": "driver.after_lease=sleep:1.5@*",
        },
    )
    began = time.monotonic()
    with (tmp_path / "said.log").open("w+") as log:
        process = program.start_into(log)
        try:
            for at, offset in enumerate(JUMPS, 1):
                assert wait_until(lambda: steps_of(folder) >= at or process.poll() is not None, 900)  # noqa: B023
                jumped(clock, offset)
            code = process.wait(900)
        except BaseException:
            process.kill()
            raise
    assert code == 0, (tmp_path / "said.log").read_text()
    assert program.all_gone(), program.survivors()
    found, summary = account(folder), summary_of(folder)
    times = [json.loads(line)["time"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    replaced = sum(summary["replacements"].values()) + summary["recoveries"]
    write_row(
        Row(
            row=22,
            fault="the wall clock jumps by an hour, forth and back, in all processes",
            account=found,
            same_bits=same_bits(folder, undisturbed),
            figures={
                "spurious time-outs": replaced + summary["samples"]["timed_out"],
                "jumps seen in the metrics, s": ", ".join(
                    f"{b - a:.0f}" for a, b in itertools.pairwise(times) if abs(b - a) > 1000
                ),
                "wall s": round(time.monotonic() - began, 1),
            },
        )
    )
    assert clean(found), found
    assert max(abs(b - a) for a, b in itertools.pairwise(times)) > 3000, "no clock jumped"
    assert replaced == summary["samples"]["timed_out"] == summary["samples"]["failed"] == 0
    assert summary["wall_s"] < 1800, "durations follow the monotonic clock"
    assert same_bits(folder, undisturbed)
    assert samples_of(folder) == samples_of(undisturbed)
