"""`treadle chaos` as an operator uses it: with the plan that the operations guide shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.e2e.programs import TINY, WITH_PROMPTS, Program, patiently, samples_of
from tests.e2e.test_documents import block

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.slow, pytest.mark.timeout(3600)]

NEVER = "  - mirror.before_commit: kill\n"
"""The recipe has no mirror."""


def test_the_guides_game_day_strikes_every_role_and_breaks_nothing(tmp_path: Path, undisturbed: Path) -> None:
    plan, folder = tmp_path / "plan.yaml", tmp_path / "run"
    plan.write_text(block("docs/operations.md", "yaml plan").replace("check:", f"{NEVER}check:"))
    words = (
        "chaos",
        str(TINY),
        WITH_PROMPTS,
        f"--plan={plan}",
        f"--dir={folder}",
        f"--compare={undisturbed}",
    )
    program, ended = patiently(*words, "--json")
    assert ended.code == 0, ended
    assert program.all_gone(within_s=90), program.survivors()
    told = json.loads(ended.out)
    assert told["broken"] == []
    assert told["same_digest"]
    assert told["drivers"] == 2
    assert {name: count for name, count in told["account"].items() if count} == {"issued": 18}
    *struck, missed = sorted(told["faults"], key=lambda fault: "mirror" in fault["fault"])
    assert all(fault["struck"] and fault["recovered_s"] > 0 for fault in struck), struck
    assert {fault["fault"].split(":")[0]: fault["recovered_by"] for fault in struck} == {
        "rollout.before_return@4": "successor",
        "verify.before_judge@6": "successor",
        "learner.before_step[1]@3": "new ranks",
        "broadcast.between_phases@2": "successor",
        "driver.after_publish@4": "next step",
        "at step 1": "successor",
    }
    assert (missed["struck"], missed["why"]) == (False, "no process passed mirror.before_commit")
    assert json.loads((folder / "chaos.json").read_text())["faults"] == told["faults"]
    assert samples_of(folder) == samples_of(undisturbed)


def test_a_plan_with_a_misspelt_failpoint_is_refused_before_anything_starts(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("faults:\n  - rollout.before_return@4: kill\n  - rollout.before_drew@4: kill\n")
    ended = Program(words=("chaos", str(TINY), WITH_PROMPTS, f"--plan={plan}", f"--dir={tmp_path}/run")).run(
        300
    )
    assert ended.code == 2
    assert f"{plan}:3: failpoint 'rollout.before_drew' does not exist. Did you mean" in ended.complaint
    assert not (tmp_path / "run").exists()
