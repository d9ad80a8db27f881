"""Checkpoints of a stage: what is written in which order, and what a restart finds."""

from __future__ import annotations

import asyncio
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from tests.workflows.plain_stage import PlainLearner

from treadle.platform.checkpoints import Checkpoints, Skipped
from treadle.platform.errors import ConfigError, DataError, FailpointError
from treadle.platform.failpoints import arm
from treadle.platform.ledger import Ledger
from treadle.platform.records import Json
from treadle.workflows.mirroring import RunMirror
from treadle.workflows.saving import CheckpointConfig, CheckpointKeeper, Position

PER_STEP = 2


@dataclass
class Stage:
    """A stage of two groups per step over real files: a ledger, checkpoints and a plain learner."""

    folder: Path
    ledger: Ledger
    learner: PlainLearner
    keeper: CheckpointKeeper
    told: list[Skipped]

    def play(self, steps: range) -> None:
        for step in steps:
            ids = [f"rl/{PER_STEP * step + i:08d}" for i in range(PER_STEP)]
            for id_ in ids:
                self.ledger.issue(id_, f"prompt of {id_}", step)
                self.ledger.drawn(id_, step, step, 5)
                self.ledger.scored(id_, scored=1, failed=0, timed_out=0)
            self.ledger.lease(ids, step)
            self.learner.state = 1000 + step + 1
            self.ledger.trained("rl", step)
            self.save(step + 1)

    def save(self, step: int, *, with_groups: bool = True, cursor: int = -1) -> bool:
        cursor = PER_STEP * step if cursor < 0 else cursor
        return asyncio.run(self.keeper.after_step("rl", step, cursor, with_groups=with_groups))

    def restored(self) -> Position:
        return asyncio.run(self.keeper.restore("rl"))

    def committed(self) -> list[int]:
        return [ref.step for ref in Checkpoints(self.folder / "checkpoints").committed("rl")]


@pytest.fixture
def stages(tmp_path: Path) -> Iterator[object]:
    """Opens the stage in the same folder as often as asked, as restarts do."""
    opened: list[Ledger] = []

    def open_stage(config: CheckpointConfig | None = None) -> Stage:
        ledger = Ledger.open(tmp_path / "ledger.sqlite")
        opened.append(ledger)
        learner = PlainLearner()
        config = config or CheckpointConfig(every_steps=2, keep=2)
        told: list[Skipped] = []
        keeper = CheckpointKeeper(
            config, str(tmp_path / "checkpoints"), ledger, learner, passed_over=told.append
        )
        return Stage(tmp_path, ledger, learner, keeper, told)

    yield open_stage
    for ledger in opened:
        ledger.close()
    arm()


def test_a_stage_without_a_checkpoint_begins_at_its_beginning(stages) -> None:  # type: ignore[no-untyped-def]
    stage = stages()
    assert stage.restored() == Position()
    assert stage.learner.state == 0


def test_only_every_nth_step_is_saved_and_only_the_newest_are_kept(stages) -> None:  # type: ignore[no-untyped-def]
    stage = stages()
    stage.play(range(9))
    assert stage.committed() == [6, 8]


@pytest.mark.parametrize("every_steps", [0, 2])
def test_a_commit_in_a_hurry_is_made_after_the_next_step_and_once(stages, every_steps: int) -> None:  # type: ignore[no-untyped-def]
    stage = stages(CheckpointConfig(every_steps=every_steps, keep=9))
    stage.play(range(2, 4))
    stage.keeper.hurry()
    stage.play(range(4, 5))
    hurried = stage.committed()
    stage.play(range(5, 7))
    assert hurried == ([4, 5] if every_steps else [5])
    assert stage.committed() == ([4, 5, 6] if every_steps else [5])


def test_nothing_is_saved_when_checkpoints_are_off(stages) -> None:  # type: ignore[no-untyped-def]
    stage = stages(CheckpointConfig(every_steps=0))
    stage.play(range(5))
    assert stage.committed() == []


def test_a_restart_continues_after_the_newest_checkpoint_and_forgets_what_came_later(stages) -> None:  # type: ignore[no-untyped-def]
    stages().play(range(5))
    again = stages()
    assert again.restored() == Position(step=4, cursor=8, pending=())
    assert again.learner.state == 1004
    assert sorted(again.ledger.trained_ids("rl")) == [0, 1, 2, 3]
    again.play(range(4, 6))
    audit = again.ledger.audit("rl")
    assert (audit.trained, audit.doubled, audit.lost, audit.in_flight) == (12, 0, 0, 0)


def test_a_damaged_checkpoint_is_passed_over_and_the_ledger_follows(stages) -> None:  # type: ignore[no-untyped-def]
    first = stages()
    first.play(range(4))
    shard = (
        Path(Checkpoints(first.folder / "checkpoints").url("rl", 4).removeprefix("file://")) / "state.json"
    )
    shard.write_bytes(bytes(reversed(shard.read_bytes())))
    again = stages()
    assert again.restored() == Position(step=2, cursor=4, pending=())
    assert again.learner.state == 1002
    assert sorted(again.ledger.trained_ids("rl")) == [0, 1]
    (skipped,) = again.told
    assert (skipped.step, Path(skipped.url)) == (4, shard.parent)
    assert "state.json is damaged: its CRC-32 does not match" in skipped.reason
    assert again.committed() == [2]  # the damaged one is made again, not resumed from
    again.play(range(2, 4))
    assert again.committed() == [2, 4]


def test_a_checkpoint_of_a_newer_format_is_refused_and_stays(stages) -> None:  # type: ignore[no-untyped-def]
    stages().play(range(4))
    again = stages()
    manifest = again.folder / "checkpoints" / "rl" / "step-00000004" / "manifest.json"
    body = json.loads(manifest.read_bytes()) | {"format": 2}
    body.pop("crc32")
    body["crc32"] = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    manifest.write_text(json.dumps(body))
    with pytest.raises(
        DataError, match=r"step-00000004: checkpoint format 2, this version reads 1\. Resume with"
    ):
        again.restored()
    assert again.committed() == [2, 4]
    assert (again.learner.state, again.told) == (0, [])


class SlowMirror:
    """Is still copying the first commit it was offered."""

    def __init__(self) -> None:
        self.offered: list[int] = []

    async def offer(self, stage: str, step: int, checkpoint: str) -> None:
        self.offered.append(step)

    def held(self, stage: str) -> frozenset[int]:
        return frozenset(self.offered[:1])

    def holds(self, stage: str, step: int) -> bool:
        return False

    def check(self) -> None: ...


def test_a_checkpoint_that_is_being_copied_to_the_mirror_is_kept(stages) -> None:  # type: ignore[no-untyped-def]
    stage, mirror = stages(), SlowMirror()
    config = CheckpointConfig(every_steps=2, keep=1)
    root = str(stage.folder / "checkpoints")
    stage.keeper = CheckpointKeeper(config, root, stage.ledger, stage.learner, mirror=cast(RunMirror, mirror))
    stage.play(range(8))
    assert stage.committed() == [2, 8]
    assert mirror.offered == [2, 4, 6, 8]
    assert stage.restored().step == 8
    assert mirror.offered == [2, 4, 6, 8, 8], "the mirror may lack what a restart found"


def test_groups_in_flight_at_the_checkpoint_are_issued_again(stages) -> None:  # type: ignore[no-untyped-def]
    stage = stages()
    stage.play(range(1))
    for number, when in ((4, "before the mark"), (5, "before the mark")):
        stage.ledger.issue(f"rl/{number:08d}", when, 1)
    stage.save(2, cursor=6)
    stage.ledger.issue("rl/00000006", "after the mark", 2)
    assert stages().restored() == Position(step=2, cursor=6, pending=(4, 5))


@pytest.mark.parametrize(
    ("point", "steps"),
    [
        ("driver.after_shards", 2),
        ("checkpoint.before_manifest", 2),
        ("checkpoint.before_marker", 2),
        ("driver.after_mark", 2),
        ("driver.after_checkpoint", 4),
    ],
)
def test_whatever_dies_while_saving_the_newest_commit_can_be_continued(
    stages, point: str, steps: int
) -> None:  # type: ignore[no-untyped-def]
    stage = stages()
    stage.play(range(2))
    arm({**os.environ, "TREADLE_FAILPOINTS": f"{point}=raise@1"})
    with pytest.raises(FailpointError):
        stage.play(range(2, 4))
    arm({})
    again = stages()
    restored = again.restored()
    assert (restored.step, again.learner.state) == (steps, 1000 + steps)
    assert again.committed()[-1] == steps
    again.play(range(steps, 6))
    audit = again.ledger.audit("rl")
    assert (audit.trained, audit.doubled, audit.lost, audit.in_flight) == (12, 0, 0, 0)


def test_the_shards_come_first_then_the_mark_then_the_marker(stages) -> None:  # type: ignore[no-untyped-def]
    stage = stages()
    found: list[tuple[bool, bool, bool]] = []

    def look() -> None:
        folder = stage.folder / "checkpoints" / "rl" / "step-00000002"
        found.append(
            (
                (folder / "state.json").exists(),
                any(mark.step == 2 for mark in stage.ledger.marks("rl")),
                (folder / "COMMITTED").exists(),
            )
        )

    class Looking(PlainLearner):
        async def save(self, folder: str, extra: Mapping[str, Json]) -> None:
            look()
            await super().save(folder, extra)
            look()

    stage.keeper = CheckpointKeeper(
        CheckpointConfig(every_steps=2), str(stage.folder / "checkpoints"), stage.ledger, Looking()
    )
    for point in ("driver.after_shards", "driver.after_mark"):
        arm({"TREADLE_FAILPOINTS": f"{point}=raise"})
        with pytest.raises(FailpointError):
            stage.save(2)
        look()
    arm({})
    stage.save(2)
    look()
    first, written, after_shards = found[:3]
    assert (first, written, after_shards) == ((False,) * 3, (True, False, False), (True, False, False))
    assert found[5] == (True, True, False)  # after the mark
    assert found[-1] == (True, True, True)


def test_a_supervised_stage_needs_no_ledger_mark(stages) -> None:  # type: ignore[no-untyped-def]
    stage = stages()
    stage.learner.state = 77
    assert stage.save(2, with_groups=False)
    assert not stage.save(3, with_groups=False)
    again = stages()
    assert again.restored() == Position(step=2, cursor=4)
    assert again.learner.state == 77


def test_settings_that_cannot_work_are_refused() -> None:
    for config in (CheckpointConfig(every_steps=-1), CheckpointConfig(keep=0)):
        with pytest.raises(ConfigError, match=r"checkpoint\.every_steps"):
            config.check()
