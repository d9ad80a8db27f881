"""Decisions about settings that memory grows with, without a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from treadle.cluster.backoff import BackOffs, Lever
from treadle.cluster.recovery import Action, Decision, Failure, RecoveryConfig, RecoveryPolicy
from treadle.platform.errors import ConfigError, LearnerError

LEVER = Lever(
    role="learner",
    name="the learner",
    setting="learner.max_tokens_per_microbatch",
    configured=8192,
    now=8192,
    least=100,
    why_least="it is down to one longest sequence",
)


def down(lever: Lever, limit: int = 100) -> list[int]:
    """The values the setting takes until it stays."""
    back_offs, found = BackOffs(limit), []
    while (back_off := back_offs.lower(lever)) is not None:
        found.append(back_off.after)
        lever = replace(lever, now=back_off.after)
    return found


def test_a_setting_is_halved_down_to_its_floor_and_never_below() -> None:
    assert down(replace(LEVER, now=900)) == [450, 225, 112, 100]
    assert down(replace(LEVER, now=96, least=8, multiple=8)) == [48, 24, 8], "whole multiples"
    assert down(replace(LEVER, now=24, least=16, multiple=8)) == [16]
    assert down(replace(LEVER, now=100)) == []


def test_it_is_halved_so_often_and_no_more_and_each_process_counts_for_itself() -> None:
    back_offs = BackOffs(2)
    assert [back_offs.lower(LEVER) is not None for _ in range(3)] == [True, True, False]
    assert "lowered recovery.max_oom_backoffs=2 times from 8192" in back_offs.refusal(LEVER)
    assert back_offs.lower(replace(LEVER, name="rollout-1")) is not None
    assert BackOffs(0).lower(LEVER) is None
    assert BackOffs(0).refusal(LEVER).endswith("recovery.oom_backoff=false")


def decided(policy: RecoveryPolicy, lever: Lever | None, step: int = 7) -> Decision:
    error, broken = LearnerError(f"rank 1 failed with {lever.now if lever else 'no lever'}"), "learner"
    return policy.decide(Failure(stage="rl", step=step, error=error, broken=frozenset({broken}), lever=lever))


def test_memory_that_runs_out_is_met_with_half_and_not_counted_as_the_same_try_again() -> None:
    policy, lever, tries = RecoveryPolicy(RecoveryConfig(same_step=1, max_oom_backoffs=3)), LEVER, []
    while (decision := decided(policy, lever)).back_off is not None:
        tries.append(decision.back_off.after)
        assert decision.action is Action.ROLL_BACK
        lever = replace(lever, now=decision.back_off.after)
    assert tries == [4096, 2048, 1024]
    assert decision.action is Action.STOP
    assert decision.reason == (
        "memory has run out 4 times after step 7, and learner.max_tokens_per_microbatch=1024 stays in force for "
        "the learner: it was lowered recovery.max_oom_backoffs=3 times from 8192."
    )


def test_other_failures_of_the_step_lower_nothing_and_have_their_own_count() -> None:
    policy = RecoveryPolicy(RecoveryConfig(same_step=1))
    assert decided(policy, None).back_off is None
    assert decided(policy, LEVER).action is Action.STOP, "same_step is used up, whatever fails next"
    assert decided(policy, LEVER, step=8).back_off is not None


def test_where_nothing_may_be_lowered_a_lack_of_memory_is_mended_as_often_as_anything_else() -> None:
    policy = RecoveryPolicy(RecoveryConfig(oom_backoff=False, same_step=2))
    assert [decided(policy, LEVER).action for _ in range(3)] == [Action.ROLL_BACK] * 2 + [Action.STOP]


def test_storms_stay_capped_while_settings_go_down() -> None:
    policy = RecoveryPolicy(RecoveryConfig(max_recoveries=2))
    assert [decided(policy, LEVER, step).action for step in range(3)] == [Action.ROLL_BACK] * 2 + [
        Action.STOP
    ]


def test_never_is_said_by_switching_it_off() -> None:
    with pytest.raises(ConfigError, match=r"recovery\.max_oom_backoffs=0 must be at least 1") as refused:
        RecoveryConfig(max_oom_backoffs=0).check()
    assert "recovery.oom_backoff=false" in refused.value.remedy
