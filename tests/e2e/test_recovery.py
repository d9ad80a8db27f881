"""A run mends itself: what is killed in its middle is replaced, and it ends with the same bits, samples and books."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.programs import TINY, WITH_PROMPTS, Program, patiently, samples_of, summary_of

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.slow, pytest.mark.timeout(3600)]

FAULTS = (
    "broadcast.between_phases=kill@3",  # the coordinator, while engines hold a staged version: replaced in place
    "learner.mid_save=kill@1",  # a rank writes the first checkpoint: nothing is committed yet
    "learner.after_backward=kill@3",  # in a step, two steps after a commit
    "learner.after_optimizer_step=kill@3",  # the step is made, and neither published nor in the ledger
    "rollout.mid_generation=kill@9",  # a worker, in the middle of a group
    "verify.in_child=kill@5",  # the process that judges
    "verify.before_judge=kill@4",  # the verify actor before it has judged a group
    "verify.before_return=kill@7",  # and after
)


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mended")
    (folder / "once").mkdir()
    program, ended = patiently(
        *("run", str(TINY), WITH_PROMPTS, "--dir", str(folder / "run")),
        TREADLE_FAILPOINTS=";".join(FAULTS),
        TREADLE_FAILPOINTS_ONCE=str(folder / "once"),
    )
    assert ended.code == 0, ended
    assert program.all_gone(), program.survivors()
    assert len(list((folder / "once").iterdir())) == len(FAULTS), "a fault did not happen"
    return folder / "run"


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line["fields"] for line in lines if line["kind"] == kind]


def test_a_killed_process_of_any_role_changes_no_bit_and_no_reward(mended: Path, undisturbed: Path) -> None:
    mine, theirs = summary_of(mended), summary_of(undisturbed)
    assert mine["weights_digest"] == theirs["weights_digest"]
    assert mine["eval"] == theirs["eval"]
    assert samples_of(mended) == samples_of(undisturbed)
    assert (theirs["recoveries"], mine["recoveries"]) == (0, 3)


def test_the_ledger_says_that_nothing_was_lost_or_trained_twice(mended: Path, undisturbed: Path) -> None:
    samples = summary_of(mended)["samples"]
    assert (samples["doubled"], samples["lost"], samples["in_flight"]) == (0, 0, 0)
    assert samples["trained"] == summary_of(undisturbed)["samples"]["trained"]
    assert samples["failed"] == samples["timed_out"] == 0


def test_every_recovery_is_told_with_its_cause(mended: Path) -> None:
    told = events(mended, "recovery")
    assert [one["step"] for one in told] == [2, 2, 4]
    for one, doing in zip(told, ("save to", "step 2", "step 4"), strict=True):
        assert doing in one["message"]
        assert "died" in one["message"]
        assert one["replaced"] == "learner"
        assert one["seconds"] > 0
    print("seconds from failure to new ranks:", [one["seconds"] for one in told])
    assert events(mended, "failure") == []
    assert (mended / "report.html").read_text().count("<td>mended</td>") == 3


def test_what_was_known_at_the_first_failure_is_kept(mended: Path) -> None:
    files = sorted((mended / "failures").iterdir())
    assert [file.name for file in files] == ["0001.json", "0002.json", "0003.json"]
    first = json.loads(files[0].read_text())
    assert "died" in first["message"]
    assert first["driver"]["stage"] == "rl"
    dead = [name for name, said in first["roles"].items() if said == "does not answer"]
    assert len(dead) == 1
    assert dead[0].startswith("learner-")
    assert {"rollout-0", "verify", "learner-0", "learner-1"} <= set(first["roles"])
    living = ({"learner-0", "learner-1"} - set(dead)).pop()
    assert first["stacks"][living].startswith("thread ")
    assert "ActorDiedError" in first["stacks"][dead[0]]
    said = Program(words=("status", str(mended))).run().out
    assert f"first failure: LearnerError: {first['message']}" in said
    assert str(files[0]) in said
