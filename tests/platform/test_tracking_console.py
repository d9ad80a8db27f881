"""The progress line on a terminal and without one."""

from __future__ import annotations

import io
import math

import pytest

from treadle.platform.tracking.console import Console, Eta, duration, progress_line, short


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_estimate_is_not_moved_by_one_slow_step() -> None:
    eta = Eta(total=100)
    now = 0.0
    for step in range(1, 21):
        now += 60.0 if step == 10 else 2.0
        eta.tick(step, now)
    assert eta.left_s(20) == pytest.approx(160.0)


def test_the_estimate_follows_steps_that_become_slower() -> None:
    eta = Eta(total=1000, window=5)
    now = 0.0
    for step in range(1, 101):
        now += 1.0 if step < 90 else 3.0
        eta.tick(step, now)
    assert eta.step_s == pytest.approx(3.0)


def test_nothing_is_estimated_before_the_second_step() -> None:
    eta = Eta(total=10)
    eta.tick(1, 5.0)
    assert math.isnan(eta.left_s(1))
    assert duration(eta.left_s(1)) == "–"


def test_a_resumed_stage_estimates_from_its_own_steps() -> None:
    eta = Eta(total=100)
    eta.tick(81, 1000.0)
    eta.tick(82, 1002.0)
    assert eta.left_s(82) == pytest.approx(36.0)


def test_durations_and_figures_are_short() -> None:
    assert [duration(s) for s in (5.31, 59, 65, 3725, math.nan)] == ["5.3s", "59s", "1:05", "1:02:05", "–"]
    assert [short(v) for v in (12345, 0.01234, 1_500_000, 1234, -0.5, 0)] == [
        "12.3k",
        "0.0123",
        "1.5M",
        "1234",
        "-0.5",
        "0",
    ]


def test_the_line_shows_what_was_measured_and_nothing_else() -> None:
    eta = Eta(total=300)
    eta.tick(11, 0.0)
    eta.tick(12, 0.5)
    line = progress_line(
        "grpo", 12, 300, {"reward/mean": 0.512, "perf/tokens_per_s": 12345.0}, eta=eta, elapsed_s=65
    )
    assert line == "grpo  12/300  reward 0.512  12.3k tok/s  0.5s/step  ETA 2:24  elapsed 1:05"


def test_on_a_terminal_the_line_is_rewritten_in_place_and_kept_at_the_end() -> None:
    stream, clock = _Terminal(), _Clock()
    console = Console(stream, clock=clock)
    for step in range(3):
        clock.now += 1
        console.progress(f"step {step}", step=step, last=step == 2)
    assert "\n" not in stream.getvalue()
    console.keep()
    assert stream.getvalue() == "\r\x1b[2Kstep 0\r\x1b[2Kstep 1\r\x1b[2Kstep 2\n"


def test_a_line_longer_than_the_terminal_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = _Terminal()
    Console(stream).progress("x" * 50, step=0, last=True)
    assert stream.getvalue() == "\r\x1b[2K" + "x" * 18 + "…"


def test_a_message_on_a_terminal_leaves_the_progress_line_below_it() -> None:
    stream = _Terminal()
    console = Console(stream)
    console.progress("step 0", step=0, last=True)
    console.say("failure")
    assert stream.getvalue().endswith("\r\x1b[2Kfailure\nstep 0")


def test_without_a_terminal_lines_come_at_most_every_two_seconds_and_at_the_end() -> None:
    stream, clock = io.StringIO(), _Clock()
    console = Console(stream, clock=clock)
    for step in range(1, 51):
        clock.now += 0.125
        console.progress(f"step {step}", step=step, last=step == 50)
    assert stream.getvalue().split("\n") == ["step 1", "step 17", "step 33", "step 49", "step 50", ""]
    assert "\r" not in stream.getvalue()


def test_without_a_terminal_every_nth_step_can_be_asked_for() -> None:
    stream, clock = io.StringIO(), _Clock()
    console = Console(stream, every=10, clock=clock)
    for step in range(1, 31):
        console.progress(f"{step}", step=step, last=False)
    assert stream.getvalue().split() == ["1", "10", "20", "30"]


def test_a_closed_pipe_ends_the_console_not_the_run() -> None:
    stream = io.StringIO()
    console = Console(stream)
    stream.close()
    console.say("anyone?")
    console.progress("step 1", step=1, last=True)
