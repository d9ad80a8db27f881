"""`treadle scale`: what may be asked, and how the driver obeys. Without roles."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from treadle.actors.rollout.membership import Resized
from treadle.platform.errors import ConfigError, DataError, FencedError
from treadle.platform.ledger import Ledger
from treadle.workflows.elastic import FILE, Scaler, ask, forget
from treadle.workflows.folder import RunFolder
from treadle.workflows.inspection import status
from treadle.workflows.recipe import load_recipe
from treadle.workflows.run import Run


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that this process runs."""
    found = RunFolder.of(tmp_path / "run", load_recipe("demo"))
    found.set_state(state="running", pid=os.getpid())
    return found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to change"),
        (["learner.ranks=4"], "learner.ranks cannot change while a run goes on"),
        (["rollout.workers=0"], "rollout.workers=0"),
        (["rollout.workers=many"], "rollout.workers: expected int, got 'many'"),
        (["verify.processes=0"], "verify.processes=0"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_and_not_left(
    folder: RunFolder, words: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        ask(folder.path, words)
    assert not (folder.path / FILE).exists()


def test_a_run_that_nobody_runs_is_refused_with_what_to_do(folder: RunFolder, tmp_path: Path) -> None:
    folder.set_state(state="interrupted")
    with pytest.raises(ConfigError, match=r"not being run.*treadle resume .* rollout.workers=3"):
        ask(folder.path, ["rollout.workers=3"])
    with pytest.raises(DataError, match="holds no run"):
        ask(tmp_path / "nowhere", ["rollout.workers=3"])


@dataclass
class PlainCrew:
    engines_ready: bool = True
    workers: int = 1
    processes: int = 2
    refused: dict[str, str] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        return {"rollout.workers": self.workers, "verify.processes": self.processes}

    async def resize_workers(self, workers: int) -> Resized:
        names = tuple(f"rollout-{number}" for number in range(self.workers, workers))
        self.workers = workers - len(self.refused)
        return Resized(joined=tuple(n for n in names if n not in self.refused), refused=self.refused)

    async def resize_verifiers(self, processes: int) -> None:
        if processes > 9:
            raise ConfigError("verify.max_processes=9 is below.")
        self.processes = processes


@dataclass
class PlainRun:
    folder: RunFolder
    ledger: Ledger
    crew: PlainCrew = field(default_factory=PlainCrew)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def tracker(self) -> Any:
        return SimpleNamespace(
            say=lambda text: None, event=lambda kind, fields: self.events.append((kind, fields))
        )


def looked(run: PlainRun, times: int = 1, scaler: Scaler | None = None) -> Scaler:
    scaler = scaler or Scaler(cast(Run, run))

    async def look() -> None:
        for _ in range(times):
            await scaler.look()

    asyncio.run(look())
    return scaler


def test_the_driver_obeys_each_request_once_and_tells_it(folder: RunFolder) -> None:
    with Ledger.open(folder.ledger) as ledger:
        run = PlainRun(folder, ledger)
        scaler = looked(run)
        assert run.events == []
        assert ask(folder.path, ["rollout.workers=3"])["asked"] == {"rollout.workers": 3}
        looked(run, 3, scaler)
        [(kind, fields)] = run.events
        assert (kind, fields["rollout.workers"], fields["joined"]) == ("scaled", 3, "rollout-1, rollout-2")
        assert ask(folder.path, ["verify.processes=4"])["asked"] == {
            "rollout.workers": 3,
            "verify.processes": 4,
        }
        looked(run, 2, scaler)
        assert (run.crew.workers, run.crew.processes, len(run.events)) == (3, 4, 2)
        again = PlainRun(folder, ledger)
        looked(again)
        assert again.crew.workers == 3, "what was asked last holds for the next attempt"
        forget(folder.path)
        fresh = PlainRun(folder, ledger)
        looked(fresh)
        assert fresh.crew.workers == 1


def test_a_request_waits_until_the_engines_are_up(folder: RunFolder) -> None:
    with Ledger.open(folder.ledger) as ledger:
        run = PlainRun(folder, ledger, PlainCrew(engines_ready=False))
        ask(folder.path, ["rollout.workers=3"])
        scaler = looked(run)
        assert run.crew.workers == 1
        run.crew.engines_ready = True
        looked(run, 1, scaler)
        assert run.crew.workers == 3


def test_what_could_not_join_is_told(folder: RunFolder) -> None:
    with Ledger.open(folder.ledger) as ledger:
        run = PlainRun(folder, ledger, PlainCrew(refused={"rollout-2": "no node has 4 GPU."}))
        ask(folder.path, ["rollout.workers=3"])
        looked(run)
        assert [(kind, fields.get("message")) for kind, fields in run.events] == [
            ("scale_refused", "no node has 4 GPU."),
            ("scaled", None),
        ]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"id": "a"}',
        '{"id": "a", "sizes": {"learner.ranks": 3}}',
        '{"id": "a", "sizes": {"rollout.workers": true}}',
        '{"id": "a", "sizes": {"rollout.workers": 0}}',
        '{"id": "a", "sizes": {"rollout.workers": "3"}}',
        '{"id": "a", "sizes": {"verify.processes": 10}}',
    ],
)
def test_a_request_of_somebody_elses_making_is_refused_once(folder: RunFolder, content: str) -> None:
    (folder.path / FILE).write_text(content)
    with Ledger.open(folder.ledger) as ledger:
        run = PlainRun(folder, ledger)
        looked(run, 3)
        assert [kind for kind, _ in run.events] == ["scale_refused"]
        assert (run.crew.workers, run.crew.processes) == (1, 2)


def test_a_driver_that_was_replaced_obeys_nobody(folder: RunFolder) -> None:
    with Ledger.open(folder.ledger) as old, Ledger.open(folder.ledger):
        run = PlainRun(folder, old)
        ask(folder.path, ["rollout.workers=3"])
        with pytest.raises(FencedError):
            looked(run)
        assert run.crew.workers == 1


def test_status_shows_the_sizes_and_what_is_going_on(folder: RunFolder) -> None:
    now = {
        "unix_s": 0.0,
        "driver": {"stage": "grpo", "step": 2, "doing": "learn", "for_s": 1.0},
        "roles": {},
        "sizes": {"rollout.workers": 2, "verify.processes": 3},
        "scaling": "rollout.workers=4",
    }
    (folder.path / "roles.json").write_text(json.dumps(now))
    said = status(folder.path)["text"]
    assert "sizes: rollout.workers=2, verify.processes=3; being scaled to rollout.workers=4" in said
