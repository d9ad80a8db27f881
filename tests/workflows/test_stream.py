"""The stream of groups: order, staleness, dropping and replacing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from tests.workflows.plain_roles import CoinRollouts, DigitVerifiers, ListBook, NumberedPrompts

from treadle.platform.errors import DeadlineError, RolloutError
from treadle.platform.records import Sampling, WeightVersion
from treadle.workflows.stream import GroupStream, Ready


def stream_of(
    rollouts: CoinRollouts, verifiers: DigitVerifiers, book: ListBook, **changes: Any
) -> GroupStream:
    settings: dict[str, Any] = {
        "stage": "rl",
        "prompts": NumberedPrompts(),
        "rollouts": rollouts,
        "verifiers": verifiers,
        "book": book,
        "sampling": Sampling(temperature=1.0, top_p=1.0, max_new_tokens=4, group_size=4, seed=3),
        "per_step": 3,
        "staleness": 0,
        "version": WeightVersion(step=0),
        "take_deadline_s": 5.0,
    }
    return GroupStream(**{**settings, **changes})


def played(
    steps: int,
    rollouts: CoinRollouts,
    verifiers: DigitVerifiers | None = None,
    learn: Callable[[int], Awaitable[None]] | None = None,
    **changes: Any,
) -> tuple[list[list[Ready]], ListBook, GroupStream]:
    """Takes `steps` batches of a stage of `total` steps (as many by default), publishing version t+1 after
    batch t."""
    changes["steps"] = changes.pop("total", steps)
    book = ListBook()

    async def play() -> tuple[list[list[Ready]], GroupStream]:
        stream = stream_of(rollouts, verifiers or DigitVerifiers(), book, **changes)
        batches = []
        try:
            for step in range(changes.get("version", WeightVersion(step=0)).step, steps):
                batches.append(await stream.take(step))
                if learn:
                    await learn(step)
                rollouts.version = WeightVersion(step=step + 1)
                stream.advance(rollouts.version)
        finally:
            await stream.close()
        return batches, stream

    batches, stream = asyncio.run(play())
    return batches, book, stream


def ids(batch: list[Ready]) -> list[str]:
    return [ready.drawn.id for ready in batch]


def test_without_staleness_every_group_is_drawn_with_the_weights_it_updates() -> None:
    rollouts = CoinRollouts()
    batches, _, _ = played(4, rollouts)
    assert [[r.drawn.oldest.step for r in batch] for batch in batches] == [[t] * 3 for t in range(4)]


def test_batches_hold_the_prompts_in_issue_order_even_when_they_finish_in_another() -> None:
    slow_first = CoinRollouts(delay_s=lambda group: 0.03 if group.endswith("0") else 0.0)
    batches, _, _ = played(2, slow_first)
    assert [ids(batch) for batch in batches] == [
        ["rl/00000000", "rl/00000001", "rl/00000002"],
        ["rl/00000003", "rl/00000004", "rl/00000005"],
    ]


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_no_trained_group_is_older_than_the_bound(staleness: int) -> None:
    jitter = np.random.default_rng(staleness)
    rollouts = CoinRollouts(delay_s=lambda group: float(jitter.uniform(0, 0.02)))

    async def learn(step: int) -> None:
        await asyncio.sleep(0.005)

    batches, _, _ = played(12, rollouts, learn=learn, staleness=staleness)
    ages = [step - ready.drawn.oldest.step for step, batch in enumerate(batches) for ready in batch]
    assert max(ages) <= staleness
    assert max(ages) > 0, "nothing was drawn ahead of the learner"
    taken = [i for batch in batches for i in ids(batch)]
    assert len(taken) == len(set(taken))


def test_groups_are_drawn_while_the_learner_works_when_the_bound_allows_it() -> None:
    rollouts = CoinRollouts()
    seen: list[int] = []

    async def learn(step: int) -> None:
        before = len(rollouts.drawn)
        await asyncio.sleep(0.02)
        seen.append(len(rollouts.drawn) - before)

    played(3, rollouts, learn=learn, staleness=1, total=10)
    assert seen == [0, 3, 3]  # the first two batches are drawn before the first step
    seen.clear()
    played(3, CoinRollouts(), learn=learn, staleness=0)
    assert seen == [0, 0, 0]


def test_a_group_that_became_too_old_is_dropped_counted_and_replaced() -> None:
    slow = CoinRollouts(delay_s=lambda group: 0.2 if group == "rl/00000001" else 0.0)

    async def learn(step: int) -> None:
        await asyncio.sleep(0.06)

    batches, book, stream = played(6, slow, learn=learn, staleness=1)
    assert book.of("dropped:stale") == ["rl/00000001"]
    assert stream.dropped == {"stale": 1}
    assert all(len(batch) == 3 for batch in batches)


def test_groups_of_a_broken_verifier_are_replaced_and_never_count_as_zero() -> None:
    broken = DigitVerifiers(broken=lambda group: group == "rl/00000001")
    batches, book, _ = played(1, CoinRollouts(), broken)
    assert book.of("dropped:unscored") == ["rl/00000001"]
    assert ids(batches[0]) == ["rl/00000000", "rl/00000002", "rl/00000003"]
    assert not np.isnan([r.outcome.rewards for r in batches[0]]).any()


def test_a_prompt_that_ends_workers_is_set_aside_and_replaced() -> None:
    batches, book, stream = played(1, CoinRollouts(poisoned=("rl/00000001",)))
    assert book.of("dropped:poisoned") == book.of("quarantined:p1 ends workers") == ["rl/00000001"]
    assert ids(batches[0]) == ["rl/00000000", "rl/00000002", "rl/00000003"]
    assert stream.dropped == {"poisoned": 1}


def test_dynamic_sampling_keeps_only_groups_with_different_rewards() -> None:
    batches, _, _ = played(3, CoinRollouts(), drop_zero_variance=True)
    assert all(np.ptp(ready.outcome.rewards) > 0 for batch in batches for ready in batch)
    again, _, _ = played(3, CoinRollouts(), drop_zero_variance=True)
    assert [ids(b) for b in batches] == [ids(b) for b in again]


def test_dynamic_sampling_that_finds_nothing_says_what_to_change() -> None:
    with pytest.raises(RolloutError, match=r"zero_variance 2\d.*dynamic_sampling"):
        played(1, CoinRollouts(skill=lambda step: 1.0), drop_zero_variance=True)


def test_nothing_is_issued_beyond_the_last_step() -> None:
    batches, book, _ = played(3, CoinRollouts(), staleness=2)
    assert len(book.of("issued")) == 9
    assert sorted(i for batch in batches for i in ids(batch)) == book.of("issued")


def test_a_resumed_stream_issues_what_was_pending_first_and_then_goes_on() -> None:
    rollouts = CoinRollouts(version=WeightVersion(step=2))
    batches, _, stream = played(3, rollouts, version=WeightVersion(step=2), pending=(4, 6), cursor=9)
    assert ids(batches[0]) == ["rl/00000004", "rl/00000006", "rl/00000009"]
    assert stream.cursor >= 10


def test_a_draw_that_never_ends_becomes_a_deadline_that_names_the_group() -> None:
    stuck = CoinRollouts(delay_s=lambda group: 60.0 if group.endswith("2") else 0.0)
    with pytest.raises(DeadlineError, match=r"step 0 of stage rl has 2 of 3 groups.*rl/00000002"):
        played(1, stuck, take_deadline_s=0.2)


def test_an_error_of_a_draw_reaches_the_taker() -> None:
    class Failing(CoinRollouts):
        async def draw(self, issue: Any) -> Any:
            raise RolloutError("rollout/draw: the engine broke.")

    with pytest.raises(RolloutError, match="engine broke"):
        played(1, Failing())
