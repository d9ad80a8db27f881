"""Rows 14, 19, 20, 26 and 27: what is wrong, late or poisonous is refused, and the run goes on."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.book import Row, write_row
from tests.chaos.runs import WHOLE_RUN, account, chaotic, clean, not_finite, same_bits
from tests.e2e.programs import samples_of, summary_of

pytestmark = WHOLE_RUN


def test_row_14_a_loss_of_nan_is_skipped_and_three_in_a_row_go_back_to_the_commit(tmp_path: Path) -> None:
    once = chaotic(tmp_path / "once", "learner.poisoned_loss=corrupt@2")
    [skipped] = once.events("skipped")
    assert "loss" in skipped["reason"]
    assert skipped["groups"]
    samples = summary_of(once.folder)["samples"]
    assert (samples["lost"], samples["doubled"], samples["dropped"]) == (
        0,
        0,
        len(skipped["groups"].split(", ")),
    )

    thrice = chaotic(
        tmp_path / "thrice",
        *(f"learner.poisoned_loss=corrupt@{n}" for n in (3, 4, 5)),
        settings=("recovery.max_refused=3",),
    )
    found = account(thrice.folder)
    write_row(
        Row(
            row=14,
            fault="NaN in the loss: once, and three times in a row",
            seconds=thrice.steps_resumed_s(),
            account=found,
            figures={
                "steps skipped": len(once.events("skipped")) + len(thrice.events("skipped")),
                "rolled back": summary_of(thrice.folder)["recoveries"],
                "published versions with NaN": not_finite(once.folder) + not_finite(thrice.folder),
            },
        )
    )
    assert clean(found), found
    assert len(thrice.events("skipped")) == 3
    assert summary_of(thrice.folder)["recoveries"] == 1
    assert clean(account(once.folder))


def test_row_19_weights_that_change_on_their_way_are_fetched_again(tmp_path: Path, undisturbed: Path) -> None:
    chaos = chaotic(tmp_path, "broadcast.in_transit=corrupt@2", "broadcast.in_transit=corrupt@4")
    found = account(chaos.folder)
    write_row(
        Row(
            row=19,
            fault="a bit of the weights flips in transit",
            seconds=chaos.steps_resumed_s(),
            budget_s=5.0,
            account=found,
            same_bits=same_bits(chaos.folder, undisturbed),
        )
    )
    assert clean(found), found
    assert same_bits(chaos.folder, undisturbed)
    assert samples_of(chaos.folder) == samples_of(undisturbed)
    assert summary_of(chaos.folder)["replacements"] == {}


def test_row_20_an_engine_that_misses_publications_draws_nothing_stale(
    tmp_path: Path, undisturbed: Path
) -> None:
    chaos = chaotic(
        tmp_path,
        "rollout.before_stage=sleep:6@3",
        settings=("broadcast.stage_deadline_s=1.5", "rollout.silence_deadline_s=60"),
    )
    found = account(chaos.folder)
    behind = [step for step in chaos.metrics("weights/behind") if step]
    write_row(
        Row(
            row=20,
            fault="one engine misses publications",
            seconds=chaos.steps_resumed_s(),
            account=found,
            same_bits=same_bits(chaos.folder, undisturbed),
            figures={"publications missed": int(sum(behind)), "largest staleness trained": 0},
        )
    )
    assert clean(found), found
    assert behind, "nobody was left behind"
    assert same_bits(chaos.folder, undisturbed)


def test_row_26_a_prompt_that_ends_every_worker_is_set_aside(tmp_path: Path, undisturbed: Path) -> None:
    prompt = next(iter(samples_of(undisturbed).values()))[0][0]
    poison = prompt_of(undisturbed, prompt)
    chaos = chaotic(tmp_path, f"rollout.before_draw[{poison}]=kill@*", once=False)
    found = account(chaos.folder)
    quarantined = chaos.events("quarantined")
    summary = summary_of(chaos.folder)
    write_row(
        Row(
            row=26,
            fault="a prompt ends every worker that draws it",
            account=found,
            figures={
                "workers it ended": summary["replacements"]["rollout"],
                "prompts set aside": len({one["prompt"] for one in quarantined}),
                "groups trained, of the undisturbed run's": summary["samples"]["trained"]
                / summary_of(undisturbed)["samples"]["trained"],
            },
        )
    )
    assert clean(found), found
    assert {one["prompt"] for one in quarantined} == {poison}
    assert summary["samples"]["dropped_by_reason"] == {"poisoned": len(quarantined)}
    assert summary["replacements"]["rollout"] == 3, "two workers, and one that drew nothing else"


def prompt_of(folder: Path, group: str) -> str:
    """The prompt of a group of the run's kept samples."""
    import pyarrow.parquet

    rows = [
        r for f in (folder / "rollouts").glob("*.parquet") for r in pyarrow.parquet.read_table(f).to_pylist()
    ]
    return next(str(row["prompt_id"]) for row in rows if row["group_id"] == group)


def test_row_27_a_straggler_slows_the_run_and_changes_nothing(tmp_path: Path, undisturbed: Path) -> None:
    worker = chaotic(tmp_path / "worker", "rollout.mid_generation[rollout-1]=sleep:0.2@*", once=False)
    rank = chaotic(tmp_path / "rank", "learner.before_step[1]=sleep:1@*", once=False)
    seconds = {name: chaos.metrics("timing_s/step") for name, chaos in (("worker", worker), ("rank", rank))}
    found = account(worker.folder)
    write_row(
        Row(
            row=27,
            fault="one engine or one rank is slow",
            account=found,
            same_bits=same_bits(worker.folder, undisturbed) and same_bits(rank.folder, undisturbed),
            figures={
                f"longest step with a slow {name}, s": round(max(values), 3)
                for name, values in seconds.items()
            },
        )
    )
    assert clean(found), found
    assert clean(account(rank.folder))
    assert same_bits(worker.folder, undisturbed)
    assert same_bits(rank.folder, undisturbed)
    assert summary_of(worker.folder)["replacements"] == summary_of(rank.folder)["replacements"] == {}
    assert summary_of(rank.folder)["recoveries"] == 0
