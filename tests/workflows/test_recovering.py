"""Playing a stage through failures, without processes; with them: tests/e2e/test_recovery.py."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from treadle.actors.rollout.config import RolloutConfig
from treadle.cluster.backoff import BackOff, Lever
from treadle.cluster.recovery import RecoveryConfig, RecoveryPolicy
from treadle.platform.errors import (
    BroadcastError,
    ConfigError,
    Interrupted,
    LearnerError,
    RefusedError,
    TreadleError,
)
from treadle.platform.memory import AT_THE_FLOOR, REMEDIES
from treadle.workflows import commands, detached, recovering
from treadle.workflows.configs import PretrainConfig, SftConfig
from treadle.workflows.progress import holder
from treadle.workflows.recipe import Recipe


@dataclass
class PlainCrew:
    """Counts replacements; `broken` is what it says of itself."""

    sick: frozenset[str] = frozenset({"learner"})
    replaced: int = 0
    stillborn: int = 0
    microbatch: int = 72
    trail: list[str] = field(default_factory=list)

    def lever(self, longest_tokens: int) -> Lever:
        return Lever(
            role="learner",
            name="the learner",
            setting="learner.max_tokens_per_microbatch",
            configured=8192,
            now=self.microbatch,
            least=longest_tokens,
            why_least="it is down to one longest sequence",
        )

    def lower(self, back_off: BackOff) -> None:
        self.microbatch = back_off.after
        self.trail.append(f"lower to {back_off.after}")

    async def broken(self) -> frozenset[str]:
        return self.sick

    async def replace_broken(self) -> None:
        self.trail.append("start ranks")
        self.replaced += 1
        if self.replaced <= self.stillborn:
            raise LearnerError(f"learner.start: rank 0 died, attempt {self.replaced}")

    async def doing(self) -> dict[str, str]:
        return {"learner-0": "does not answer"}

    def sizes(self) -> dict[str, int]:
        return {"rollout.workers": 2}

    async def stacks(self) -> dict[str, str]:
        return {"learner-0": "gone"}


@dataclass
class PlainRun:
    """As much of a run as `play_stage` needs."""

    path: Path
    crew: PlainCrew = field(default_factory=PlainCrew)
    recoveries: int = 0
    recipe: Recipe = field(default_factory=lambda: Recipe(rollout=RolloutConfig(max_context_tokens=32)))
    back_offs: list[BackOff] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)

    @property
    def folder(self) -> Any:
        return SimpleNamespace(path=self.path)

    @property
    def tracker(self) -> Any:
        redactor = SimpleNamespace(message=lambda text: text)
        return SimpleNamespace(
            say=lambda text: None,
            event=lambda kind, fields, stage: self.told.append(fields),
            redactor=redactor,
            mlflow=None,
        )

    def lowered(self, back_off: BackOff) -> None:
        self.back_offs.append(back_off)

    def step_of(self, stage: str) -> int:
        return 4

    def doing(self) -> tuple[str, int, str, float]:
        return "rl", 4, "learn", 0.5


def play(
    run: PlainRun, monkeypatch: pytest.MonkeyPatch, *errors: TreadleError, **settings: int
) -> list[TreadleError]:
    """Plays a stage that fails with each error in turn and then ends. Returns those that did not happen."""
    left = list(errors)

    async def run_stage(*_: object) -> str:
        if left:
            raise left.pop(0)
        return "output"

    monkeypatch.setattr(recovering, "run_stage", run_stage)
    policy = RecoveryPolicy(RecoveryConfig(**settings))  # type: ignore[arg-type]
    played = recovering.play_stage(run, "rl", None, policy)  # type: ignore[arg-type]
    assert asyncio.run(played) == "output"  # type: ignore[comparison-overlap]
    return left


def test_failures_of_broken_roles_are_mended_and_each_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PlainRun(tmp_path)
    play(run, monkeypatch, LearnerError("rank 1 died"), LearnerError("rank 0 died"))
    assert run.recoveries == run.crew.replaced == 2
    assert [one["message"] for one in run.told] == ["LearnerError: rank 1 died", "LearnerError: rank 0 died"]
    first = json.loads((tmp_path / "failures" / "0001.json").read_text())
    assert (first["error"], first["message"]) == ("LearnerError", "rank 1 died")
    assert first["roles"] == {"learner-0": "does not answer"}
    assert first["driver"]["doing"] == "learn"


def test_a_step_that_fails_every_time_stops_the_run_with_the_first_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PlainRun(tmp_path)
    causes = [LearnerError("out of memory", "Lower it."), LearnerError("then late"), LearnerError("again")]
    with pytest.raises(LearnerError) as stopped:
        play(run, monkeypatch, *causes)
    assert stopped.value.message == (
        "again Not mended: it has failed 3 times after step 4; the first cause was: out of memory"
    )
    assert run.crew.replaced == 2


def test_ranks_that_do_not_come_up_are_started_again_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PlainRun(tmp_path, PlainCrew(stillborn=1))
    play(run, monkeypatch, LearnerError("rank 1 died"))
    assert (run.crew.replaced, run.recoveries) == (2, 1)
    never = PlainRun(tmp_path / "never", PlainCrew(stillborn=99))
    (tmp_path / "never").mkdir()
    with pytest.raises(
        LearnerError, match=r"attempt 2 Not mended: it has failed 3 times .* was: rank 1 died"
    ):
        play(never, monkeypatch, LearnerError("rank 1 died"))


def test_an_error_without_a_broken_role_is_the_runs_end_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PlainRun(tmp_path, PlainCrew(sick=frozenset()))
    with pytest.raises(LearnerError, match=r"^temperature=0$"):
        play(run, monkeypatch, LearnerError("temperature=0"))
    assert (run.recoveries, run.crew.replaced) == (0, 0)


def test_refused_updates_get_new_ranks_although_the_old_ones_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PlainRun(tmp_path, PlainCrew(sick=frozenset()))
    play(run, monkeypatch, RefusedError("3 updates in a row were refused"))
    assert run.crew.replaced == 1


NO_MEMORY = "learner.step 5: rank 1 ran out of memory (MemoryError; node 1a2b3c4d).", REMEDIES["learner"]


def test_ranks_that_ran_out_of_memory_start_again_with_half_until_one_sequence_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PlainRun(tmp_path)
    play(run, monkeypatch, LearnerError(*NO_MEMORY), BroadcastError(*NO_MEMORY), same_step=1)
    assert run.crew.trail == ["lower to 36", "start ranks", "lower to 32", "start ranks"]
    assert [(one.before, one.after) for one in run.back_offs] == [(72, 36), (36, 32)]
    again = PlainRun(tmp_path)
    with pytest.raises(LearnerError) as stopped:
        play(again, monkeypatch, *[LearnerError(*NO_MEMORY)] * 3)
    assert stopped.value.message == (
        f"{NO_MEMORY[0]} Not mended: memory has run out 3 times after step 4, and "
        "learner.max_tokens_per_microbatch=32 stays in force for the learner: it is down to one longest sequence."
    )
    assert stopped.value.remedy == AT_THE_FLOOR, "to lower it further does not help"


def test_a_lack_of_memory_elsewhere_leaves_the_learner_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PlainRun(tmp_path)
    coordinator = BroadcastError("the weight coordinator has died (its node ran out of memory).", "Move it.")
    play(run, monkeypatch, coordinator, LearnerError("rank 1 died"))
    assert (run.crew.trail, run.back_offs) == (["start ranks"] * 2, [])


def test_the_longest_sequence_of_a_stage_is_a_block_or_the_engines_context() -> None:
    recipe = Recipe(rollout=RolloutConfig(max_context_tokens=96))
    assert recovering.longest_tokens(recipe, PretrainConfig(block_tokens=64)) == 64
    assert recovering.longest_tokens(recipe, SftConfig()) == 96


def state_of(pid: int, host: str = "") -> dict[str, object]:
    return {"state": "running", "pid": pid, "host": host or socket.gethostname()}


def test_a_run_is_held_by_a_process_that_lives_and_moves() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert holder(state_of(process.pid)) == f"process {process.pid}"
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert holder(state_of(process.pid)) == "", "stopped: its successor fences it off"
        os.kill(process.pid, signal.SIGCONT)
        process.communicate(b"\n")
    assert holder(state_of(process.pid)) == ""
    assert holder(state_of(1, "elsewhere")) == "process 1 on elsewhere", "nobody here can tell"
    assert holder({"state": "failed", "pid": os.getpid()}) == ""


def test_taking_over_is_said_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("stages: {}\n")
    (tmp_path / "run.json").write_text(json.dumps(state_of(os.getpid())))
    monkeypatch.setattr(commands, "load_recipe", lambda source: "recipe")
    monkeypatch.setattr(commands, "_play", lambda *asked, **how: {"played": asked})
    with pytest.raises(ConfigError, match=rf"(?s)is being run by process {os.getpid()}.*--take-over"):
        commands.resume(str(tmp_path), [], None, "", take_over=False, as_json=False)
    assert (
        commands.resume(str(tmp_path), [], None, "", take_over=True, as_json=False)["played"][0] == "recipe"
    )


@pytest.mark.parametrize("take_over", [False, True])
def test_a_controller_elsewhere_is_asked_before_its_run_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, take_over: bool
) -> None:
    (tmp_path / "config.yaml").write_text("stages: {}\n")
    state = {**state_of(1, "elsewhere"), "controller": {"name": "run-1"}}
    (tmp_path / "run.json").write_text(json.dumps(state))
    asked: list[tuple[Path, bool]] = []
    monkeypatch.setattr(commands, "load_recipe", lambda source: "recipe")
    monkeypatch.setattr(commands, "_play", lambda *asked, **how: {})
    monkeypatch.setattr(detached, "release", lambda path, take_over: asked.append((path, take_over)))
    commands.resume(str(tmp_path), [], None, "", take_over=take_over, as_json=False)
    assert asked == [(tmp_path, take_over)]


def test_a_stop_is_no_failure_to_be_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = PlainRun(tmp_path)
    with pytest.raises(Interrupted, match="on request"):
        play(run, monkeypatch, Interrupted("Stopped on request."))
    assert (run.crew.replaced, run.told) == (0, [])


def test_a_run_that_somebody_runs_is_not_replaced_by_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("stages: {}\n")
    (tmp_path / "run.json").write_text(json.dumps(state_of(os.getpid())))
    with pytest.raises(ConfigError, match=rf"is being run by process {os.getpid()}.*treadle stop"):
        commands.run("demo", [], tmp_path, "", fresh=True, dry_run=False, as_json=False)
    assert (tmp_path / "config.yaml").exists()
