"""A run that is followed looks as it does on its own console."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from treadle.platform.tracking import RunTracker, TrackingConfig
from treadle.platform.tracking.follow import Follower

CONFIG = TrackingConfig(mlflow="off", console_every=1)


def begun(folder: Path) -> tuple[RunTracker, io.StringIO]:
    stream = io.StringIO()
    return RunTracker(folder, CONFIG, name="r1", stream=stream), stream


def without_times(text: str) -> list[str]:
    """Lines without what depends on the clock's next digit."""
    return [re.sub(r"(ETA|elapsed|after|\d\S*s/step) ?\S*", r"\1", line) for line in text.splitlines()]


def play(tracker: RunTracker, steps: int, total: int = 4) -> None:
    stage = tracker.stage("grpo", total_steps=total)
    for step in range(steps):
        stage.log(step, {"reward/mean": 0.25 * step, "timing_s/step": 0.5})
        if step == 1:
            tracker.say("rollout-0 was replaced")
            stage.event("failure", {"role": "verify", "message": "worker 3 died"})
    if steps == total:
        stage.close()


@pytest.mark.parametrize("pieces", [False, True])
def test_what_is_followed_is_what_the_console_shows(tmp_path: Path, pieces: bool) -> None:
    shown = io.StringIO()
    follower = Follower(tmp_path, shown)
    assert not follower.look(), "nothing is there yet"
    tracker, console = begun(tmp_path)
    if pieces:
        follower.look()
    play(tracker, 4)
    if pieces:
        follower.look()
    tracker.close()
    assert follower.look()
    assert not follower.look()
    mine, theirs = without_times(shown.getvalue()), without_times(console.getvalue())
    assert mine[0].startswith("run r1")
    assert mine[-1].startswith("run finished after")
    last = "grpo 4/4  reward 0.75"
    assert any(line.startswith(last) for line in mine)
    assert [line for line in mine if "/4" not in line] == [line for line in theirs if "/4" not in line]
    assert {line for line in mine if "/4" in line} <= {line for line in theirs if "/4" in line}


def test_whoever_comes_late_sees_the_newest_line_and_what_follows(tmp_path: Path) -> None:
    tracker, _ = begun(tmp_path)
    play(tracker, 3)
    shown = io.StringIO()
    follower = Follower(tmp_path, shown)
    follower.catch_up()
    assert [line.split("  ")[0] for line in shown.getvalue().splitlines()] == ["grpo 3/4"]
    tracker.say("later")
    follower.look()
    assert shown.getvalue().splitlines()[1:] == ["later"]
    tracker.close()


def test_a_new_attempt_does_not_show_where_the_old_one_was_killed(tmp_path: Path) -> None:
    killed, _ = begun(tmp_path)
    play(killed, 3)
    follower = Follower(tmp_path, io.StringIO())
    follower.catch_up(show=False)
    again, _ = begun(tmp_path)
    late = io.StringIO()
    Follower(tmp_path, late).catch_up()
    assert late.getvalue() == ""
    again.close()
    killed.close()


def test_a_torn_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    tracker, _ = begun(tmp_path)
    shown = io.StringIO()
    follower = Follower(tmp_path, shown)
    follower.catch_up()
    events = tmp_path / "events.jsonl"
    line = events.read_bytes().replace(b"run_start", b"said").replace(b'"name"', b'"text"')
    with events.open("ab") as file:
        file.write(line[:20])
    follower.look()
    assert shown.getvalue() == ""
    with events.open("ab") as file:
        file.write(line[20:])
    follower.look()
    assert shown.getvalue() == "r1\n"
    tracker.close()
