"""A verifier that hangs in the middle of a GRPO run changes no other reward (one that is killed: `test_recovery`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.e2e.programs import TINY, WITH_PROMPTS, patiently, samples_of, summary_of

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.slow, pytest.mark.timeout(3600)]


CANARY = "canary-5e1b0c77a9d4"
"""A secret in the environment of whoever starts the run."""


def faulty_run(folder: Path, fault: str, *settings: str) -> dict[str, Any]:
    """A whole run in which the fault happens once, in whatever process passes the point. Returns its summary."""
    (folder / "once").mkdir(parents=True)
    words = ("run", str(TINY), WITH_PROMPTS, *settings, "--dir", str(folder / "run"))
    program, ended = patiently(
        *words,
        TREADLE_FAILPOINTS=fault,
        TREADLE_FAILPOINTS_ONCE=str(folder / "once"),
        SOME_API_KEY=CANARY,
    )
    assert ended.code == 0, ended
    assert program.all_gone(), program.survivors()
    assert len(list((folder / "once").iterdir())) == 1, "the fault did not happen"
    assert CANARY not in ended.out + ended.err
    return summary_of(folder / "run")


def test_a_hung_verifier_costs_one_sample_its_verdict_and_is_no_zero(
    undisturbed: Path, tmp_path: Path
) -> None:
    summary = faulty_run(tmp_path, "verify.in_child=sleep:600@5", "verify.deadline_s=3")
    assert summary["samples"]["timed_out"] == 1
    assert summary["samples"]["trained"] == summary_of(undisturbed)["samples"]["trained"]
    assert summary["samples"]["lost"] == summary["samples"]["dropped"] == 0
    first = min(samples_of(undisturbed))
    ours, theirs = samples_of(tmp_path / "run")[first], samples_of(undisturbed)[first]
    differing = [(mine, other) for mine, other in zip(ours, theirs, strict=True) if repr(mine) != repr(other)]
    assert len(differing) == 1, "all other samples of the step have their rewards"
    mine, other = differing[0]
    assert mine[:3] == other[:3]
    assert repr(mine[3]) == "nan"
    assert files_with(CANARY, tmp_path / "run") == []


def files_with(text: str, folder: Path) -> list[str]:
    """What holds the text: figures, events, verdicts, logs, the ledger, the report."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "ledger.sqlite", "report.html"} <= {path.name for path in files}
    assert any("rollouts" in path.parts for path in files)
    return [str(path) for path in files if text.encode() in path.read_bytes()]
