"""Decisions about failures, without a cluster."""

from __future__ import annotations

import pytest

from treadle.cluster.recovery import Action, Failure, RecoveryConfig, RecoveryPolicy
from treadle.platform.errors import (
    ConfigError,
    DataError,
    DeadlineError,
    LearnerError,
    MismatchError,
    RolloutError,
    TreadleError,
)

LEARNER = frozenset({"learner"})


def failure(error: TreadleError, step: int = 7, broken: frozenset[str] = LEARNER) -> Failure:
    return Failure(stage="rl", step=step, error=error, broken=broken)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("error", [LearnerError("rank 1 died"), DeadlineError("late"), RolloutError("lost")])
def test_a_broken_role_is_replaced_and_the_stage_rolled_back(error: TreadleError) -> None:
    decision = RecoveryPolicy(RecoveryConfig()).decide(failure(error))
    assert decision.action is Action.ROLL_BACK
    assert "the learner" in decision.reason


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (ConfigError("bad"), LEARNER),
        (DataError("bad"), LEARNER),
        (MismatchError("wrong weights"), LEARNER),
        (LearnerError("temperature=0"), frozenset()),
        (RolloutError("budget spent"), frozenset()),
    ],
)
def test_what_a_replacement_cannot_cure_stops_the_run(error: TreadleError, broken: frozenset[str]) -> None:
    decision = RecoveryPolicy(RecoveryConfig()).decide(failure(error, broken=broken))
    assert decision.action is Action.STOP
    assert decision.reason == "", "the error says all there is to say"


def test_a_step_that_fails_again_and_again_stops_the_run_with_the_first_cause() -> None:
    policy = RecoveryPolicy(RecoveryConfig(same_step=2))
    for cause in ("out of memory", "then a timeout"):
        assert policy.decide(failure(LearnerError(cause))).action is Action.ROLL_BACK
    last = policy.decide(failure(LearnerError("and again")))
    assert last.action is Action.STOP
    assert "3 times after step 7" in last.reason
    assert "out of memory" in last.reason
    assert policy.decide(failure(LearnerError("elsewhere"), step=9)).action is Action.ROLL_BACK


def test_a_storm_is_capped_and_the_cap_is_lifted_with_time() -> None:
    clock = Clock()
    policy = RecoveryPolicy(RecoveryConfig(max_recoveries=3, window_s=100.0), clock)
    for step in range(3):
        assert policy.decide(failure(LearnerError(f"cause {step}"), step)).action is Action.ROLL_BACK
        clock.now_s += 10
    refused = policy.decide(failure(LearnerError("one more"), 3))
    assert refused.action is Action.STOP
    assert "recovery.max_recoveries=3" in refused.reason
    assert "cause 0" in refused.reason
    clock.now_s += 100
    assert policy.decide(failure(LearnerError("later"), 4)).action is Action.ROLL_BACK


def test_recovery_can_be_switched_off() -> None:
    decision = RecoveryPolicy(RecoveryConfig(max_recoveries=0)).decide(failure(LearnerError("rank 0 died")))
    assert decision == RecoveryPolicy(RecoveryConfig(max_recoveries=0)).decide(failure(LearnerError("x")))
    assert (decision.action, decision.reason) == (Action.STOP, "recovery.max_recoveries=0.")


@pytest.mark.parametrize("changes", [{"max_recoveries": -1}, {"window_s": 0.0}, {"same_step": 0}])
def test_settings_that_cannot_work_are_refused_by_name(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"recovery.{next(iter(changes))}"):
        RecoveryConfig(**changes).check()  # type: ignore[arg-type]
