"""Stacks of the threads of this process."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from treadle.platform.failpoints import arm, failpoint
from treadle.platform.stacks import places, stacks
from treadle.platform.tracking.spool import SpoolWriter


def test_a_thread_that_hangs_is_shown_by_name_and_place() -> None:
    release = threading.Event()

    def waits_for_nobody() -> None:
        release.wait(30)

    thread = threading.Thread(target=waits_for_nobody, name="stuck")
    thread.start()
    try:
        shown = stacks()
    finally:
        release.set()
        thread.join()
    assert "thread stuck:" in shown
    assert "waits_for_nobody" in shown
    assert "test_a_thread_that_hangs" not in shown, "the asking thread is not asked about"


class Slow(dict[str, float]):
    """A record that takes its time to be written."""

    def __init__(self, release: threading.Event) -> None:
        super().__init__(loss=1.0)
        self._release = release

    def items(self):  # type: ignore[no-untyped-def]
        self._release.wait(30)
        return super().items()


def test_a_place_is_the_innermost_function_of_ours_and_threads_elsewhere_have_none(tmp_path: Path) -> None:
    release, spool = threading.Event(), SpoolWriter(tmp_path / "spool.jsonl")
    ours = threading.Thread(target=lambda: spool.append(Slow(release)))
    other = threading.Thread(target=lambda: release.wait(30))
    ours.start()
    other.start()
    try:
        deadline = time.monotonic() + 10
        while "_finite" not in places() and time.monotonic() < deadline:
            time.sleep(0.01)
        shown, of_ours, of_other = places(), places(ours.ident), places(other.ident)
    finally:
        release.set()
        ours.join()
        other.join()
    assert of_ours.startswith("in _finite (platform/tracking/spool.py:")
    assert of_ours in shown
    assert of_other == ""


def test_a_fault_on_order_is_placed_where_it_was_ordered() -> None:
    """The failpoint's own functions say nothing about where a process hangs."""
    arm({"TREADLE_FAILPOINTS": "driver.after_issue=sleep:2@1"})
    thread = threading.Thread(target=lambda: failpoint("driver.after_issue"))
    thread.start()
    try:
        time.sleep(0.2)
        shown = places(thread.ident)
    finally:
        thread.join()
        arm({})
    assert "failpoints.py" not in shown
