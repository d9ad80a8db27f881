"""Rows 1 to 6 of the failure matrix: a process of each role dies in each of its phases."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.book import Row, write_row
from tests.chaos.runs import WHOLE_RUN, account, chaotic, clean, same_bits
from tests.e2e.programs import samples_of, summary_of

pytestmark = WHOLE_RUN


def test_row_01_a_rollout_worker_is_killed_in_each_phase(tmp_path: Path, undisturbed: Path) -> None:
    chaos = chaotic(
        tmp_path,
        "rollout.before_draw=kill@4",
        "rollout.mid_generation=kill@9",
        "rollout.before_return=kill@5",
        "rollout.before_stage=kill@3",
        "rollout.before_flip=kill@4",
    )
    found = account(chaos.folder)
    write_row(
        Row(
            row=1,
            fault="kill -9 of a rollout worker: drawing, returning, fetching and adopting weights",
            seconds=chaos.recoveries_s("rollout"),
            budget_s=5.0,
            account=found,
            same_bits=same_bits(chaos.folder, undisturbed),
        )
    )
    assert clean(found), found
    assert same_bits(chaos.folder, undisturbed)
    assert samples_of(chaos.folder) == samples_of(undisturbed)
    assert set(summary_of(chaos.folder)["replacements"]) == {"rollout"}
    told = " ".join(event["message"] for event in chaos.events("replaced"))
    untold = [
        file.name for file in (tmp_path / "once").iterdir() if f"process {file.read_text()} " not in told
    ]
    # A replacement that dies while it catches up was never there: what is told is the end of its predecessor.
    assert all(name.startswith(("rollout.before_stage", "rollout.before_flip")) for name in untold), untold
    assert summary_of(chaos.folder)["recoveries"] == 0


def test_row_02_a_verifier_is_killed_while_it_waits_judges_and_answers(
    tmp_path: Path, undisturbed: Path
) -> None:
    chaos = chaotic(
        tmp_path, "verify.before_judge=kill@4", "verify.in_child=kill@9", "verify.before_return=kill@6"
    )
    found = account(chaos.folder)
    write_row(
        Row(
            row=2,
            fault="kill -9 of a verifier: queued, running, judged and not acknowledged",
            seconds=chaos.recoveries_s("verify"),
            budget_s=3.0,
            account=found,
            same_bits=same_bits(chaos.folder, undisturbed),
            figures={"failed": summary_of(chaos.folder)["samples"]["failed"]},
        )
    )
    assert clean(found), found
    assert samples_of(chaos.folder) == samples_of(undisturbed), "every sample was judged, and once"
    assert summary_of(chaos.folder)["samples"]["failed"] == 0
    assert summary_of(chaos.folder)["replacements"] == {"verify": 2}, (
        "the third is a process, replaced by its pool"
    )


def test_row_03_a_verifier_that_hangs_costs_one_sample_and_no_neighbour(
    tmp_path: Path, undisturbed: Path
) -> None:
    chaos = chaotic(tmp_path, "verify.in_child=sleep:600@7", settings=("verify.deadline_s=2",))
    found = account(chaos.folder)
    samples = summary_of(chaos.folder)["samples"]
    write_row(
        Row(
            row=3,
            fault="a verifier hangs",
            seconds=chaos.steps_resumed_s(),
            budget_s=3.0,
            account=found,
            figures={"timed_out": samples["timed_out"], "leaked processes": 0},
        )
    )
    assert clean(found), found
    assert (samples["timed_out"], samples["failed"]) == (1, 0)
    assert samples["trained"] == summary_of(undisturbed)["samples"]["trained"]


def test_row_04_a_learner_rank_is_killed_in_each_phase(tmp_path: Path, undisturbed: Path) -> None:
    chaos = chaotic(
        tmp_path,
        "learner.before_step=kill@2",  # passages are counted anew in every process
        "learner.before_save=kill@1",
        "learner.mid_save=kill@1",
        "learner.after_backward=kill@3",
        "learner.after_optimizer_step=kill@3",  # made, and neither published nor in the ledger
        settings=("recovery.same_step=5",),
    )
    found = account(chaos.folder)
    write_row(
        Row(
            row=4,
            fault="kill -9 of a learner rank: before a step, after backward, after the update, while saving",
            seconds=chaos.steps_resumed_s(),
            budget_s=15.0,
            account=found,
            same_bits=same_bits(chaos.folder, undisturbed),
            figures={"recoveries": summary_of(chaos.folder)["recoveries"]},
        )
    )
    assert clean(found), found
    assert same_bits(chaos.folder, undisturbed)
    assert samples_of(chaos.folder) == samples_of(undisturbed)
    assert summary_of(chaos.folder)["recoveries"] == 5


def test_row_05_all_learner_ranks_are_killed_at_once(tmp_path: Path, undisturbed: Path) -> None:
    chaos = chaotic(tmp_path, "learner.before_step[0]=kill@3", "learner.before_step[1]=kill@3")
    found = account(chaos.folder)
    write_row(
        Row(
            row=5,
            fault="kill -9 of all learner ranks",
            seconds=chaos.steps_resumed_s(),
            budget_s=20.0,
            account=found,
            same_bits=same_bits(chaos.folder, undisturbed),
            figures={"recoveries": summary_of(chaos.folder)["recoveries"]},
        )
    )
    assert clean(found), found
    assert same_bits(chaos.folder, undisturbed)
    assert summary_of(chaos.folder)["recoveries"] == 1


def test_row_06_the_weight_coordinator_is_killed_in_each_phase(tmp_path: Path, undisturbed: Path) -> None:
    chaos = chaotic(
        tmp_path,
        "broadcast.before_publish=kill@2",
        "broadcast.between_phases=kill@2",
        "broadcast.after_flip=kill@2",
    )
    found = account(chaos.folder)
    write_row(
        Row(
            row=6,
            fault="kill -9 of the weight coordinator: idle, engines hold a staged version, after adoption",
            seconds=chaos.recoveries_s("coordinator"),
            budget_s=5.0,
            account=found,
            same_bits=same_bits(chaos.folder, undisturbed),
        )
    )
    assert clean(found), found
    assert same_bits(chaos.folder, undisturbed)
    assert summary_of(chaos.folder)["replacements"] == {"coordinator": 3}
    assert summary_of(chaos.folder)["recoveries"] == 0
