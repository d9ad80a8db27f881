"""The loops over plain roles, a real ledger, real checkpoints and a real tracker: what a stage writes down,
and that a run which is cut off anywhere ends with the same state as one that is not."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
from tests.workflows.plain_roles import CoinRollouts, DigitVerifiers, NumberedPrompts
from tests.workflows.plain_stage import PlainBroadcast, PlainLearner

from treadle.platform.errors import FailpointError, Interrupted, RefusedError
from treadle.platform.failpoints import arm
from treadle.platform.ledger import Ledger
from treadle.platform.records import StepBatch, StepReport
from treadle.platform.tracking import RunTracker, TrackingConfig, read_metrics
from treadle.workflows.configs import GrpoConfig
from treadle.workflows.data.batches import RowList, TokenRow, batches
from treadle.workflows.fit import fit
from treadle.workflows.grpo import grpo
from treadle.workflows.journal import Journal
from treadle.workflows.models import ModelConfig
from treadle.workflows.roles import Roles
from treadle.workflows.saving import CheckpointConfig, CheckpointKeeper

CONFIG = GrpoConfig(
    model=ModelConfig(architecture="qwen2"), steps=8, prompts_per_step=3, group_size=4, max_new_tokens=4
)


@dataclass
class Attempt:
    """One process's life in a run folder: opens everything there, plays the stage, closes everything."""

    folder: Path
    config: GrpoConfig = CONFIG
    rollouts: CoinRollouts = field(default_factory=CoinRollouts)
    verifiers: DigitVerifiers = field(default_factory=DigitVerifiers)
    learner: PlainLearner = field(default_factory=PlainLearner)
    reports: list[StepReport] = field(default_factory=list)

    def play(self) -> Attempt:
        asyncio.run(self._opened(self._grpo))
        return self

    def fit(self, batch: Callable[[int], StepBatch], steps: int, stop_at: int = -1) -> Attempt:
        async def loop(roles: Roles, journal: Journal) -> None:
            async def stop(step: int) -> bool:
                return step == stop_at

            async for report in fit(roles, batch, steps, journal, stop=stop):
                self.reports.append(report)

        asyncio.run(self._opened(loop))
        return self

    async def _grpo(self, roles: Roles, journal: Journal) -> None:
        await roles.broadcast.publish(journal.start)
        async for report in grpo(roles, self.config, NumberedPrompts(), journal):
            self.reports.append(report)

    async def _opened(self, loop) -> None:  # type: ignore[no-untyped-def]
        roles = Roles(
            rollouts=self.rollouts,  # type: ignore[arg-type]  its model never changes
            verifiers=self.verifiers,
            learner=self.learner,
            broadcast=PlainBroadcast(rollouts=self.rollouts),
            ranks=2,
        )
        with Ledger.open(self.folder / "ledger.sqlite") as ledger, (self.folder / "console").open("a") as out:
            keeper = CheckpointKeeper(
                CheckpointConfig(every_steps=2), str(self.folder / "checkpoints"), ledger, self.learner
            )
            tracker = _tracker(self.folder, out)
            try:
                position = await keeper.restore("rl")
                journal = Journal(
                    stage="rl",
                    seed=17,
                    position=position,
                    ledger=ledger,
                    tracker=tracker.stage("rl", total_steps=self.config.steps),
                    keeper=keeper,
                )
                await loop(roles, journal)
            finally:
                tracker.close()

    @property
    def audit(self) -> dict[str, int]:
        with Ledger.open(self.folder / "ledger.sqlite", read_only=True) as ledger:
            audit = ledger.audit("rl")
        return {
            "trained": audit.trained,
            "doubled": audit.doubled,
            "lost": audit.lost,
            "in_flight": audit.in_flight,
        }


def _tracker(folder: Path, out: TextIO) -> RunTracker:
    config = TrackingConfig(mlflow="off", rollouts_every=1, rollouts_per_step=100)
    return RunTracker(folder, config, name="t", stream=out)


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm({})


def folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


POINTS = (
    "driver.after_issue=raise@14",
    "driver.after_lease=raise@5",
    "driver.after_publish=raise@4",
    "driver.after_trained=raise@6",
    "driver.after_shards=raise@2",
    "driver.after_mark=raise@2",
    "checkpoint.before_marker=raise@3",
    "driver.after_checkpoint=raise@2",
)


@pytest.mark.parametrize("fault", POINTS)
def test_a_run_cut_off_anywhere_ends_as_one_that_was_not(tmp_path: Path, fault: str) -> None:
    whole = Attempt(folder(tmp_path, "whole")).play()
    cut = folder(tmp_path, "cut")
    arm({**os.environ, "TREADLE_FAILPOINTS": fault})
    with pytest.raises((FailpointError, BaseExceptionGroup)):
        Attempt(cut).play()
    arm({})
    resumed = Attempt(cut).play()
    assert resumed.learner.state == whole.learner.state
    assert resumed.reports[-1].step == CONFIG.steps - 1
    assert resumed.audit == {"trained": 24, "doubled": 0, "lost": 0, "in_flight": 0}


@pytest.mark.parametrize("asked_at", [0, 2, 3, 7])
def test_a_run_that_is_asked_to_stop_commits_the_step_at_hand_and_ends_as_one_that_was_not(
    tmp_path: Path, asked_at: int
) -> None:
    whole = Attempt(folder(tmp_path, "whole")).play()
    cut = folder(tmp_path, "cut")

    async def until_asked(roles: Roles, journal: Journal) -> None:
        await roles.broadcast.publish(journal.start)
        loop = grpo(roles, CONFIG, NumberedPrompts(), journal)
        for _ in range(asked_at):
            await anext(loop)
        journal.stop()
        async for report in loop:
            raise AssertionError(f"step {report.step} was not the last")

    with pytest.raises(Interrupted, match=f"after step {asked_at + 1} of rl, which is committed"):
        asyncio.run(Attempt(cut)._opened(until_asked))
    resumed = Attempt(cut).play()
    assert [report.step for report in resumed.reports] == list(range(asked_at + 1, CONFIG.steps))
    assert resumed.learner.state == whole.learner.state
    assert resumed.audit == {"trained": 24, "doubled": 0, "lost": 0, "in_flight": 0}


def test_a_run_cut_off_twice_ends_the_same_too(tmp_path: Path) -> None:
    whole = Attempt(folder(tmp_path, "whole")).play()
    cut = folder(tmp_path, "cut")
    for fault in ("driver.after_trained=raise@3", "driver.after_mark=raise@1"):
        arm({**os.environ, "TREADLE_FAILPOINTS": fault})
        with pytest.raises(FailpointError):
            Attempt(cut).play()
    arm({})
    assert Attempt(cut).play().learner.state == whole.learner.state


def test_the_state_depends_on_what_is_learned(tmp_path: Path) -> None:
    """Guards the two tests above: an equal state must not be a constant."""
    one = Attempt(folder(tmp_path, "one")).play()
    other = Attempt(folder(tmp_path, "other"), rollouts=CoinRollouts(skill=lambda step: 0.4)).play()
    assert one.learner.state != other.learner.state


def test_playing_a_finished_stage_again_makes_no_step(tmp_path: Path) -> None:
    Attempt(tmp_path).play()
    again = Attempt(tmp_path).play()
    assert again.reports == []
    assert again.learner.seen == []
    assert again.audit["trained"] == 24


def test_every_step_logs_rewards_lengths_staleness_and_timings(tmp_path: Path) -> None:
    Attempt(tmp_path, rollouts=CoinRollouts(skill=lambda step: 1.0)).play()
    rows = [row for row in read_metrics(tmp_path) if row.stage == "rl"]
    assert [row.step for row in rows] == list(range(8))
    for row in rows:
        assert row.metrics["reward/mean"] == 1.0
        assert row.metrics["accuracy/sampled"] == 1.0
        assert row.metrics["response_length/mean"] == 1.0
        assert row.metrics["staleness/max"] == 0.0
        assert row.metrics["samples/trained"] == 12.0
        assert row.metrics["policy/loss"] == 0.5
        assert row.metrics["timing_s/step"] >= row.metrics["timing_s/learn"] >= 0.0


def test_a_group_whose_verifier_broke_is_dropped_counted_and_replaced(tmp_path: Path) -> None:
    broken = DigitVerifiers(broken=lambda group: group in ("rl/00000001", "rl/00000009"))
    attempt = Attempt(tmp_path, verifiers=broken).play()
    trained = [id_ for _, ids in attempt.learner.seen for id_ in ids]
    assert not {"rl/00000001", "rl/00000009"} & set(trained)
    assert attempt.audit["trained"] == 24
    rows = read_metrics(tmp_path)
    assert sum(row.metrics["samples/dropped"] for row in rows) == 2.0
    assert not any(np.isnan(row.metrics["reward/mean"]) for row in rows)


@pytest.mark.parametrize("how", ["play", "fit"])
def test_several_refused_updates_in_a_row_are_an_error_that_names_them(tmp_path: Path, how: str) -> None:
    broken = PlainLearner(refused=frozenset({1, 3, 4, 5}))
    attempt = Attempt(tmp_path, learner=broken)
    with pytest.raises(RefusedError, match=r"learner.step 5 of rl: 3 updates in a row were refused.* nan"):
        attempt.play() if how == "play" else attempt.fit(batches(rows(40), rows_per_step=4, ranks=2), 8)
    assert [report.step for report in attempt.reports] == [0, 1, 2, 3, 4]
    told = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [one["fields"]["step"] for one in told if one["kind"] == "skipped"] == [1, 3, 4, 5]


def test_a_step_that_a_guard_refused_ends_as_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, learner=PlainLearner(refused=frozenset({2}))).play()
    assert attempt.audit == {"trained": 21, "doubled": 0, "lost": 0, "in_flight": 0}
    with Ledger.open(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert dict(ledger.audit("rl").dropped) == {"nan": 3}
    assert [report.step for report in attempt.reports] == list(range(8))


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_one_loop_serves_every_staleness(tmp_path: Path, staleness: int) -> None:
    attempt = Attempt(tmp_path, config=replace(CONFIG, staleness=staleness)).play()
    assert attempt.audit == {"trained": 24, "doubled": 0, "lost": 0, "in_flight": 0}
    assert max(row.metrics["staleness/max"] for row in read_metrics(tmp_path)) <= staleness


def rows(n: int) -> RowList:
    made = [
        TokenRow(token_ids=np.arange(i, i + 5, dtype=np.int32), loss_mask=np.arange(5) > 1) for i in range(n)
    ]
    return RowList(made, seed=3)


def test_a_fit_takes_up_where_its_checkpoint_was_and_sees_the_same_batches(tmp_path: Path) -> None:
    source = batches(rows(50), rows_per_step=4, ranks=2)
    whole = Attempt(folder(tmp_path, "whole")).fit(source, 9)
    cut = folder(tmp_path, "cut")
    arm({**os.environ, "TREADLE_FAILPOINTS": "driver.after_shards=raise@3"})
    with pytest.raises(FailpointError):
        Attempt(cut).fit(source, 9)
    arm({})
    resumed = Attempt(cut).fit(source, 9)
    assert [report.step for report in resumed.reports] == [4, 5, 6, 7, 8]
    assert resumed.learner.state == whole.learner.state


def test_a_fit_stops_before_the_step_at_which_it_is_good_enough(tmp_path: Path) -> None:
    source = batches(rows(50), rows_per_step=4, ranks=2)
    stopped = Attempt(tmp_path).fit(source, 9, stop_at=5)
    assert [report.step for report in stopped.reports] == [0, 1, 2, 3, 4]
    assert [step for step, _ in stopped.learner.seen] == [0, 1, 2, 3, 4]


def test_a_fit_logs_its_rate_and_what_was_noted_with_the_next_step(tmp_path: Path) -> None:
    async def loop(roles: Roles, journal: Journal) -> None:
        source = batches(rows(20), rows_per_step=4, ranks=2)
        async for report in fit(roles, source, 3, journal):
            if report.step == 0:
                journal.note({"accuracy/heldout_sampled": 0.25})

    asyncio.run(Attempt(tmp_path)._opened(loop))
    found = [row.metrics for row in read_metrics(tmp_path)]
    assert [metrics.get("accuracy/heldout_sampled") for metrics in found] == [None, 0.25, None]
    assert all(metrics["perf/tokens_per_s"] > 0 for metrics in found)
