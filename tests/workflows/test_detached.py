"""Clients of detached runs, as far as no cluster is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from treadle.platform.errors import (
    ClusterError,
    ConfigError,
    DataError,
    DeadlineError,
    Interrupted,
    LearnerError,
    RoleError,
)
from treadle.platform.records import Outcome
from treadle.workflows import detached
from treadle.workflows.detached import attach, controller_name, make_room, release, run_detached
from treadle.workflows.folder import RunFolder
from treadle.workflows.outcomes import error_of
from treadle.workflows.recipe import load_recipe

FAILED = Outcome(
    kind="LearnerError", message="learner.step 3: rank 1 died.", remedy="Resume it.", exit_code=1
)


class PlainController:
    """Answers like one, or raises what asking it would raise."""

    name = "run-1"

    def __init__(self, answer: Mapping[str, Any] | RoleError, outcome: Outcome | BaseException | None = None):
        self.answer, self.outcome, self.killed = answer, outcome, False
        self.known: Mapping[str, Any] = {"actor": "a1", "address": "127.0.0.1:9"}
        self.silences: tuple[float, ...] = (0.1,)

    def about(self, deadline_s: float = 0.0) -> Mapping[str, Any]:
        if isinstance(self.answer, RoleError):
            raise self.answer
        return self.answer

    def ended(self, meanwhile: Callable[[float], object]) -> Outcome:
        for silent_s in self.silences:
            meanwhile(silent_s)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome

    def kill(self) -> None:
        self.killed = True


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Whoever looks for a cluster prepares this process for Ray."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def follow(folder: RunFolder, outcome: Outcome | BaseException, *silences: float) -> None:
    controller = PlainController({"over": False}, outcome)
    controller.silences = silences or controller.silences
    follower = detached.Follower(folder.path, detached._stream(True))
    detached._follow(folder.path, controller, follower)  # type: ignore[arg-type]


def test_a_controller_is_named_after_its_folder_however_one_gets_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    name = controller_name(tmp_path / "mine")
    assert name.startswith("mine-")
    assert (
        name
        == controller_name(Path("mine"))
        == controller_name(Path("link"))
        == controller_name(Path("x/../mine"))
    )
    assert name != controller_name(tmp_path / "mine2")
    assert name != controller_name(tmp_path / "other" / "mine")


def test_detaching_from_an_embedded_ray_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--detach needs a cluster.*--address host:port"):
        run_detached(load_recipe("demo"), tmp_path / "run", quiet=True, continued=False)
    assert not (tmp_path / "run").exists()


def test_what_has_ended_is_attached_to_without_any_cluster(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run"):
        attach(tmp_path / "absent", "", quiet=True)
    folder = RunFolder.of(tmp_path / "run", load_recipe("demo"))
    gone = {"address": "127.0.0.1:9", "actor": "a1"}
    folder.set_state(state="finished", controller=gone)
    attach(folder.path, "", quiet=True)
    folder.set_state(state="failed", error=asdict(FAILED))
    with pytest.raises(LearnerError, match=r"rank 1 died\. Resume it\."):
        attach(folder.path, "", quiet=True)
    folder.set_state(state="running")
    with pytest.raises(ClusterError, match=r"No Ray cluster answers at cluster\.address=127\.0\.0\.1:9"):
        attach(folder.path, "", quiet=True)
    with pytest.raises(
        ClusterError, match=r"Whether a controller still runs .* cannot be found out.*--take-over"
    ):
        release(folder.path, take_over=False)
    release(folder.path, take_over=True)


def test_only_a_controller_that_works_is_in_the_way() -> None:
    busy = PlainController({"over": False})
    with pytest.raises(
        ConfigError, match=r"is being run by controller run-1\. .*treadle attach.*--take-over"
    ):
        make_room(Path("run"), busy, take_over=False)  # type: ignore[arg-type]
    assert not busy.killed
    make_room(Path("run"), busy, take_over=True)  # type: ignore[arg-type]
    over, frozen = (
        PlainController({"over": True}),
        PlainController(DeadlineError("controller run-1: silent.")),
    )
    for old in (over, frozen):
        make_room(Path("run"), old, take_over=False)  # type: ignore[arg-type]
    assert (busy.killed, over.killed, frozen.killed) == (True, True, True)


def test_a_followed_run_ends_its_client_as_itself(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.set_state(state="running", controller={"actor": "a1", "address": "127.0.0.1:9"})
    follow(folder, Outcome())
    with pytest.raises(LearnerError) as failed:
        follow(folder, FAILED)
    assert str(failed.value) == str(error_of(FAILED))
    with pytest.raises(Interrupted, match=r"the run goes on.*treadle attach .*treadle stop "):
        follow(folder, KeyboardInterrupt())
    died = RoleError("controller run-1: its node died.")
    with pytest.raises(
        RoleError, match=r"its node died\. Nothing of the run is left running; .*treadle resume"
    ):
        follow(folder, died)
    with pytest.raises(DeadlineError, match=r"it does not answer.*treadle resume .* --take-over"):
        follow(folder, DeadlineError("controller run-1: it does not answer."))
    folder.set_state(state="failed", error=asdict(FAILED))
    with pytest.raises(LearnerError):
        follow(folder, died)
    folder.set_state(controller={"actor": "another"})
    with pytest.raises(RoleError, match="its node died"):
        follow(folder, died)


def test_a_cluster_that_is_gone_is_noticed_before_ray_ends_the_client(tmp_path: Path) -> None:
    follow(RunFolder(tmp_path), Outcome(), 0.1, 9.0, 9.3, 12.0)
    with pytest.raises(
        ClusterError, match=r"No Ray cluster answers.*The run's controller was there.*--take-over"
    ):
        follow(RunFolder(tmp_path), Outcome(), 0.1, 9.0, 12.0, 18.0)
    follow(RunFolder(tmp_path), Outcome(), 9.0, 0.5, 9.0)
