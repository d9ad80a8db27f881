"""A wall clock that is set in the middle of a run is noticed, and nothing else is taken for it."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.workflows.wall_clock import WallClock


@dataclass
class Clocks:
    """Both clocks of a machine. `hold_s` passes between two looks at them."""

    true_s: float = 1000.0
    ahead_s: float = 5e8
    hold_s: float = 0.0

    def wall(self) -> float:
        self.true_s += self.hold_s
        return self.true_s + self.ahead_s

    def monotonic(self) -> float:
        return self.true_s


def test_a_clock_that_is_set_is_told_once_with_its_sign() -> None:
    clocks = Clocks()
    clock = WallClock(clocks.wall, clocks.monotonic)
    clocks.true_s += 5
    assert clock.moved_s() == 0.0
    clocks.ahead_s += 3600
    assert round(clock.moved_s()) == 3600
    assert clock.moved_s() == 0.0
    clocks.ahead_s -= 7200
    clocks.true_s += 5
    assert round(clock.moved_s()) == -7200


def test_a_clock_that_is_slewed_and_a_process_that_is_held_up_are_no_jumps() -> None:
    clocks = Clocks()
    clock = WallClock(clocks.wall, clocks.monotonic)
    for _ in range(100):
        clocks.ahead_s += 0.01
        assert clock.moved_s() == 0.0
    clocks.hold_s = 30.0  # frozen between its two questions
    assert clock.moved_s() == 0.0
    clocks.hold_s = 0.0
    assert clock.moved_s() == 0.0
