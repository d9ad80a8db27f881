"""Stacks of the threads of this process."""

from __future__ import annotations

import threading

from treadle.platform.stacks import stacks


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
