"""A run whose rollout workers and verifier processes join and leave ends like one that was left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.programs import TINY, WITH_PROMPTS, Program, samples_of, summary_of, wait_until

from treadle.platform.rollcall import ENV_ROLL
from treadle.platform.tracking import read_metrics
from treadle.workflows.gamedays.account import account, clean, events_of
from treadle.workflows.gamedays.cast import Cast

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.slow, pytest.mark.timeout(3600)]

SLOW = "learner.before_step=sleep:8@*"
"""Steps that leave time to come and go."""


def test_workers_join_and_leave_and_the_run_ends_with_the_same_bits(
    tmp_path: Path, undisturbed: Path
) -> None:
    folder, cast = tmp_path / "run", Cast(tmp_path / "roll")
    program = Program(
        words=("run", str(TINY), WITH_PROMPTS, "rollout.workers=1", "--dir", str(folder)),
        environment={ENV_ROLL: str(cast.roll), "TREADLE_FAILPOINTS": SLOW},
    )
    with (tmp_path / "said.log").open("w+") as log:
        process = program.start_into(log)
        try:

            def until(holds: Callable[[], Any]) -> None:
                assert wait_until(lambda: holds() or process.poll() is not None, 600)
                assert process.poll() is None, (tmp_path / "said.log").read_text()

            until(lambda: read_metrics(folder))
            assert len(cast.of("rollout")) == 1
            scaled(folder, "rollout.workers=3", "verify.processes=2")
            until(lambda: len(events_of(folder, "scaled")) == 1)
            assert len(cast.of("rollout")) == 3
            until(lambda: len(cast.of("verifier")) == 2)
            made = len(read_metrics(folder))
            until(lambda: len(read_metrics(folder)) >= made + 2)  # the second one was drawn by all three
            scaled(folder, "rollout.workers=1", "verify.processes=1")
            until(lambda: len(events_of(folder, "scaled")) == 2)
            assert len(cast.of("rollout")) == 1
            until(lambda: len(cast.of("verifier")) == 1)
            assert process.wait(900) == 0, (tmp_path / "said.log").read_text()
        except BaseException:
            process.kill()
            raise
    assert program.all_gone(), program.survivors()
    grown, shrunk = events_of(folder, "scaled")
    assert (grown["joined"], shrunk["left"]) == ("rollout-1, rollout-2", "rollout-1, rollout-2")
    assert summary_of(folder)["weights_digest"] == summary_of(undisturbed)["weights_digest"]
    assert samples_of(folder) == samples_of(undisturbed)
    assert clean(account(folder)), account(folder)
    assert summary_of(folder)["replacements"] == {}
    assert drawn_by(folder) == {"rollout-0", "rollout-1", "rollout-2"}


def scaled(folder: Path, *sizes: str) -> None:
    ended = Program(words=("scale", str(folder), *sizes, "--json")).run(300)
    assert ended.code == 0, ended
    assert set(json.loads(ended.out)["asked"]) == {"rollout.workers", "verify.processes"}


def drawn_by(folder: Path) -> set[str]:
    """Who drew the samples that were kept."""
    from pyarrow.parquet import read_table

    files = (folder / "rollouts").glob("*.parquet")
    return {row["worker"] for file in files for row in read_table(file).to_pylist()}
