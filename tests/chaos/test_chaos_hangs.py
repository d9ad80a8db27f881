"""A process of each role hangs in each of its phases, and nothing is mended: the run stops in time, with one sentence
that names role, process, phase and setting, and `treadle status` says the same.

A verifier process that hangs is no hang of the run: row 3. Nor is an engine that hangs while it fetches weights: the
others draw, and it is replaced.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tests.chaos.runs import WHOLE_RUN
from tests.e2e.programs import TINY, WITH_PROMPTS, Program, patiently

pytestmark = WHOLE_RUN

SETTINGS = (
    "recovery.max_recoveries=0",
    "recovery.driver_deadline_s=6",
    "rollout.max_restarts=0",
    "rollout.heartbeat_s=0.5",
    "rollout.silence_deadline_s=5",
    "learner.heartbeat_s=0.5",
    "learner.silence_deadline_s=5",
    "learner.step_deadline_s=8",
    "broadcast.max_restarts=0",
    "broadcast.heartbeat_s=0.5",
    "broadcast.silence_deadline_s=5",
    "verify.respawns=0",
    "verify.deadline_s=4",
    "verify.judge_deadline_s=6",
)
MARGIN_S = 25.0
"""Beyond the deadline: a ping (5 s), answers of processes that give none (3 s each), and closing all roles."""


SILENT, STEP = "rollout.silence_deadline_s", "learner.step_deadline_s"
START_S = 40
"""Covers what the role does before it hangs: on a crowded machine a process starts in 20 s."""
COORDINATOR = "weight coordinator has been silent for 5 s"
HANGS: dict[str, tuple[Any, ...]] = {
    "rollout.before_draw=sleep:600@4": (5, "worker rollout-", "silent for 5 s", "asked to draw rl/", SILENT),
    "rollout.mid_generation=sleep:600@9": (5, "worker rollout-", "rollout/drawing", "in _advance (", SILENT),
    "rollout.before_return=sleep:600@5": (5, "worker rollout-", "rollout/drawing", "in _collect (", SILENT),
    "rollout.mid_generation=freeze@9": (
        5,
        "worker rollout-",
        "it does not say where",
        "asked to draw rl/",
        SILENT,
    ),
    "rollout.before_flip=sleep:600@3": (5, "worker rollout-", "silent for 5 s", SILENT),
    "verify.before_judge=sleep:600@4": (
        6,
        "verify-0, judging rl/",
        "verify.judge_deadline_s",
        "verify.respawns",
    ),
    "learner.before_step[1]=sleep:600@3": (8, "rank 1 is not done", "opening references in step (", STEP),
    "learner.before_step[0]=freeze@3": (5, "rank 0 has been silent for 5 s", "learner.silence_deadline_s"),
    "learner.after_backward=sleep:600@3": (
        8,
        "learner.step 2",
        "is not done after 8 s: forward and backward",
        "in _update (",
        STEP,
    ),
    "learner.after_optimizer_step=sleep:600@3": (8, "learner.step 2", "in _update (", STEP),
    "learner.before_save=sleep:600@1": (8, "learner.save to", "save in save (", STEP),
    "learner.mid_save=sleep:600@1": (8, "learner.save to", "rank 0 is not done", "in write (", STEP),
    "broadcast.before_publish=sleep:600@3": (
        5,
        COORDINATOR,
        "it hangs in publish (",
        "broadcast.silence_deadline_s",
    ),
    "broadcast.between_phases=sleep:600@3": (
        5,
        COORDINATOR,
        "it hangs in _carry (",
        "broadcast.silence_deadline_s",
    ),
    "broadcast.after_flip=sleep:600@3": (
        5,
        COORDINATOR,
        "it hangs in _carry (",
        "broadcast.silence_deadline_s",
    ),
    "verify.before_return=sleep:600@4": (
        6,
        "verify-0, judging rl/",
        "verify.judge_deadline_s",
        "verify.respawns",
    ),
    "learner.before_setup[1]=sleep:600@1": (
        START_S,
        "learner.setup: rank 1 is not done",
        "in setup (",
        "learner.start_deadline_s",
    ),
    "learner.before_probe[0]=sleep:600@2": (8, "learner.probe: rank 0 is not done", "in logprobs (", STEP),
    "learner.before_publish[1]=sleep:600@2": (8, "rank 1", "in publish (", "broadcast.gather_deadline_s"),
    "learner.before_export[1]=sleep:600@1": (
        8,
        "learner.export to",
        "rank 1 is not done",
        "in export_hf (",
        STEP,
    ),
    "rollout.before_load[rollout-1]=sleep:600@1": (
        START_S,
        "worker rollout-1 did not answer",
        "it hangs in act (",
        "rollout.start_deadline_s",
    ),
    "rollout.before_probe[rollout-1]=sleep:600@2": (5, "worker rollout-1", "scoring", "in act (", SILENT),
    "verify.before_start=sleep:600@1": (
        START_S,
        "verify, start: actor 0",
        "it hangs in start (",
        "verify.startup_deadline_s",
    ),
    **{
        f"{point}=sleep:600@{passage}": (
            6,
            f"driver: it hangs in {function} (",
            f"rl, step {step}",
            "recovery.driver_deadline_s",
        )
        for point, passage, function, step in (
            ("driver.after_issue", 8, "issued", 2),
            ("driver.after_lease", 3, "leased", 2),
            ("driver.after_publish", 3, "trained", 2),
            ("driver.after_trained", 3, "trained", 2),
            ("driver.after_shards", 1, "after_step", 2),
            ("checkpoint.before_manifest", 1, "commit", 2),
            ("checkpoint.before_marker", 1, "commit", 2),
            ("driver.after_mark", 1, "after_step", 2),
            ("driver.after_checkpoint", 1, "after_step", 2),
        )
    },
}
"""By fault: the seconds within which it must be found, and words of the sentence."""
OTHER_DEADLINES: dict[str, str] = {
    "learner.before_setup": f"learner.start_deadline_s={START_S}",
    "learner.before_publish": "broadcast.gather_deadline_s=8",
    "rollout.before_load": f"rollout.start_deadline_s={START_S}",
    "verify.before_start": f"verify.startup_deadline_s={START_S}",
}
"""Of phases whose deadline is none of `SETTINGS`."""


@pytest.mark.parametrize("fault", HANGS)
def test_a_hang_is_told_within_its_deadline_with_its_true_place(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "run"
    deadline = next((value for point, value in OTHER_DEADLINES.items() if fault.startswith(point)), None)
    words = ("run", str(TINY), WITH_PROMPTS, *SETTINGS, *([deadline] if deadline else []), f"--dir={folder}")
    _told(folder, fault, HANGS[fault], *words)


def test_a_rank_that_hangs_while_it_reads_a_checkpoint_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ("run", str(TINY), WITH_PROMPTS, *SETTINGS, f"--dir={folder}")
    _, killed = patiently(*words, TREADLE_FAILPOINTS="driver.after_checkpoint=kill@2")
    assert killed.code == -9, killed
    told = (8, "learner.load from", "rank 1 is not done", "in load (", STEP)
    _told(folder, "learner.before_load[1]=sleep:600@1", told, "resume", str(folder))


def _told(folder: Path, fault: str, expected: tuple[Any, ...], *words: str) -> None:
    """The program of these words hangs by `fault`, and says so as `expected`."""
    deadline_s, *said = expected
    once = folder.parent / "once"
    once.mkdir()
    program, ended = patiently(*words, TREADLE_FAILPOINTS=fault, TREADLE_FAILPOINTS_ONCE=str(once))
    told_s = time.time() - next(once.iterdir()).stat().st_mtime
    print(f"{fault}: told after {told_s:.1f} s: {ended.complaint}")
    assert ended.code == 1, ended
    for word in said:
        assert word in ended.complaint
    assert told_s < deadline_s + MARGIN_S
    assert program.all_but_agents_gone(), program.survivors()
    failures = [json.loads(file.read_text()) for file in sorted((folder / "failures").glob("*.json"))]
    status = Program(words=("status", str(folder))).run()
    assert f"first failure: {failures[0]['error']}: {failures[0]['message']}" in status.out
    assert failures[0]["message"].removesuffix(" Not mended: recovery.max_recoveries=0.") in ended.complaint
    assert f"continue with: treadle resume {folder}" in status.out
