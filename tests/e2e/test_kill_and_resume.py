"""A run that is killed, interrupted and resumed ends with the same bits, samples and books as one that is not."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from tests.e2e.programs import (
    TINY,
    WITH_PROMPTS,
    Ended,
    Program,
    interrupted_when,
    patiently,
    samples_of,
    summary_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.slow, pytest.mark.timeout(7200)]

STEPS, GROUPS_PER_STEP = 6, 3
KILLS = (
    ("driver.after_publish", 1),  # the third step's: a checkpoint of two steps lies behind it
    ("driver.after_trained", 2),
    ("driver.after_issue", 5),
    ("driver.after_lease", 1),
    ("driver.after_shards", 1),
    ("driver.after_mark", 1),
    ("driver.after_checkpoint", 1),
)
"""Each kill hits the resume of the one before, somewhere between the second step and the last."""


@pytest.fixture(scope="module")
def battered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped by Ctrl-C in its third step, in which the ranks were made to linger."""
    folder = tmp_path_factory.mktemp("battered") / "run"
    checkpoint = folder / "checkpoints" / "rl" / "step-00000002" / "COMMITTED"
    for _ in range(5):
        program = Program(
            words=("run", str(TINY), WITH_PROMPTS, "--dir", str(folder), "--fresh"),
            environment={"TREADLE_FAILPOINTS": "learner.before_step=sleep:500@3"},
        )
        ended = interrupted_when(program, checkpoint.exists)
        if "Ray does not start" not in ended.err:
            break
    assert ended.code == 130, ended
    assert ended.complaint == (
        f"treadle: Interrupted: Stopped by the operator. Continue with: treadle resume {folder}"
    )
    assert program.all_gone(), program.survivors()
    return folder


def status(folder: Path) -> dict[str, object]:
    ended = Program(words=("status", str(folder), "--json")).run()
    assert ended.code == 0, ended
    value = json.loads(ended.out)
    assert isinstance(value, dict)
    return value


def test_ctrl_c_leaves_a_run_that_says_how_to_continue(battered: Path) -> None:
    said = status(battered)
    assert said["state"] == "interrupted"
    assert said["stage"] == "rl"
    text = Program(words=("status", str(battered))).run().out
    assert f"continue with: treadle resume {battered}" in text


def test_a_second_run_into_the_same_folder_is_refused(battered: Path) -> None:
    before = (battered / "run.json").read_text()
    ended = Program(words=("run", str(TINY), WITH_PROMPTS, "--dir", str(battered))).run()
    assert ended.code == 2
    assert "already holds a run" in ended.complaint
    assert f"treadle resume {battered}" in ended.complaint
    assert (battered / "run.json").read_text() == before


def test_a_run_continues_with_fewer_ranks_and_more_workers(battered: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(battered, folder)
    refused = Program(words=("resume", str(folder), "stages.rl.optim.lr=1")).run()
    assert refused.code == 2
    assert "stages.rl cannot change when a run is continued" in refused.complaint
    program, ended = patiently("resume", str(folder), "learner.ranks=1", "rollout.workers=3")
    assert ended.code == 0, ended
    assert program.all_gone(), program.survivors()
    samples = summary_of(folder)["samples"]
    assert samples["trained"] == STEPS * GROUPS_PER_STEP
    assert (samples["doubled"], samples["lost"], samples["in_flight"]) == (0, 0, 0)
    said = (folder / "config.yaml").read_text()
    assert "ranks: 1" in said, "the folder says what it was continued with"
    assert "workers: 3" in said


def killed_at(folder: Path, point: str, hit: int) -> tuple[Program, Ended]:
    program, ended = patiently("resume", str(folder), TREADLE_FAILPOINTS=f"{point}=kill@{hit}")
    assert ended.code == -signal.SIGKILL, (point, ended)
    return program, ended


def test_kill_9_at_any_point_then_resume_gives_the_same_bits(battered: Path, undisturbed: Path) -> None:
    for point, hit in KILLS:
        program, _ = killed_at(battered, point, hit)
        assert program.all_but_agents_gone(), (point, program.survivors())
        assert status(battered)["state"] == "killed"
    program, ended = patiently("resume", str(battered))
    assert ended.code == 0, ended
    assert program.all_gone(), program.survivors()
    mine, theirs = summary_of(battered), summary_of(undisturbed)
    assert mine["weights_digest"] == theirs["weights_digest"]
    assert mine["eval"] == theirs["eval"]
    assert samples_of(battered) == samples_of(undisturbed)
    assert len(samples_of(undisturbed)) == STEPS


def test_the_ledger_says_that_nothing_was_lost_or_trained_twice(battered: Path, undisturbed: Path) -> None:
    for folder in (undisturbed, battered):
        samples = summary_of(folder)["samples"]
        assert samples["trained"] == STEPS * GROUPS_PER_STEP
        assert (samples["doubled"], samples["lost"], samples["in_flight"]) == (0, 0, 0)
        assert samples["dropped"] == samples["failed"] == samples["timed_out"] == 0


def test_the_tiny_run_learns_from_rewards_that_differ(undisturbed: Path) -> None:
    """Guards the tests above: equal digests would say little of a policy that never moved."""
    rewards = {reward for rows in samples_of(undisturbed).values() for *_, reward in rows}
    assert len(rewards) > 4
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(line["metrics"]["policy/grad_norm"] > 0 for line in lines)


def test_resuming_a_finished_run_changes_nothing_and_starts_nothing(undisturbed: Path) -> None:
    before = (undisturbed / "summary.json").read_bytes()
    ended = Program(words=("resume", str(undisturbed), "--json")).run()
    assert ended.code == 0, ended
    assert json.loads(ended.out)["weights_digest"] == json.loads(before)["weights_digest"]
    assert (undisturbed / "summary.json").read_bytes() == before
    assert status(undisturbed)["attempts"] == 1


def test_a_run_exports_a_model_that_transformers_loads_with_the_same_weights(
    undisturbed: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from treadle.kernels.digest import state_digest

    ended = Program(words=("export", str(undisturbed), "--to", str(tmp_path / "model"), "--json")).run()
    assert ended.code == 0, ended
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert state_digest(model.state_dict().items()) == summary_of(undisturbed)["weights_digest"]
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id == model.config.eos_token_id
