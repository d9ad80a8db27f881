"""Dealing a step's samples to ranks: nothing twice, nothing lost, nothing reweighted."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.workflows.plain_roles import NumberedPrompts

from treadle.platform.objectives.base import GroupCredit
from treadle.platform.records import (
    Drawn,
    Share,
    StepBatch,
    StopReason,
    Verdict,
    VerdictStatus,
    WeightVersion,
)
from treadle.workflows.dealing import deal_groups, outcomes
from treadle.workflows.rewards import RewardRule
from treadle.workflows.stream import Ready


def ready(index: int, rewards: list[float], lengths: list[int]) -> Ready:
    version = WeightVersion(step=4)
    drawn = Drawn(
        id=f"rl/{index:08d}",
        prompt=NumberedPrompts().at(index),
        group=f"ref-{index}",
        texts="",
        lengths=tuple(lengths),
        stops=(StopReason.EOS,) * len(lengths),
        oldest=version,
        newest=version,
        worker="w0",
        wall_s=0.0,
    )
    verdicts = tuple(
        Verdict(
            status=VerdictStatus.FAILED if np.isnan(r) else VerdictStatus.SCORED,
            reward=r,
            parts=(),
            wall_s=0.0,
            detail="",
            verifier="t/1",
        )
        for r in rewards
    )
    return Ready(
        index=index, drawn=drawn, verdicts=verdicts, outcome=RewardRule().outcome(drawn, verdicts, 64)
    )


def credit(advantages: list[float], weights: list[float]) -> GroupCredit:
    return GroupCredit(advantages=np.array(advantages), weights=np.array(weights))


def dealt(batch: StepBatch) -> Counter[tuple[str, int]]:
    shares = [member for row in batch.rows for member in row if isinstance(member, Share)]
    return Counter((share.group_id, c.sample_index) for share in shares for c in share.credits)


groups_of_lengths = st.lists(
    st.lists(st.integers(min_value=1, max_value=200), min_size=1, max_size=6), min_size=1, max_size=8
)


@given(lengths=groups_of_lengths, ranks=st.integers(min_value=1, max_value=5))
def test_every_sample_is_dealt_exactly_once_with_its_own_credit(lengths: list[list[int]], ranks: int) -> None:
    groups = [ready(g, [1.0] * len(row), row) for g, row in enumerate(lengths)]
    credits = [
        credit([100.0 * g + i + 1 for i in range(len(row))], [0.01 * (i + 1) for i in range(len(row))])
        for g, row in enumerate(lengths)
    ]
    batch = deal_groups(7, groups, credits, ranks=ranks, temperature=0.7, keep_zero_advantage=False)
    assert (batch.step, batch.temperature, len(batch.rows)) == (7, 0.7, ranks)
    assert dealt(batch) == Counter(
        (f"rl/{g:08d}", i) for g, row in enumerate(lengths) for i in range(len(row))
    )
    for row in batch.rows:
        for share in row:
            assert isinstance(share, Share)
            g = int(share.group_id.rsplit("/", 1)[1])
            assert share.group == f"ref-{g}"
            for c in share.credits:
                assert c.advantage == 100.0 * g + c.sample_index + 1
                assert c.weight == 0.01 * (c.sample_index + 1)


@given(lengths=groups_of_lengths, ranks=st.integers(min_value=1, max_value=5))
def test_no_rank_carries_more_than_the_bound_of_longest_first(lengths: list[list[int]], ranks: int) -> None:
    groups = [ready(g, [1.0] * len(row), row) for g, row in enumerate(lengths)]
    credits = [credit([1.0] * len(row), [1.0] * len(row)) for row in lengths]
    batch = deal_groups(0, groups, credits, ranks=ranks, temperature=1.0, keep_zero_advantage=True)
    loads = [sum(share.tokens for share in row if isinstance(share, Share)) for row in batch.rows]
    tokens = [n + 1 for row in lengths for n in row]  # every prompt has one token
    assert sum(loads) == sum(tokens)
    assert max(loads) <= sum(tokens) / ranks + max(tokens)


def test_a_sample_without_a_gradient_is_left_out_only_where_nothing_else_pulls_at_it() -> None:
    groups = [ready(0, [1.0, 1.0, float("nan")], [3, 4, 5])]
    credits = [credit([0.0, 2.0, 0.0], [0.1, 0.1, 0.0])]
    without_kl = deal_groups(0, groups, credits, ranks=2, temperature=1.0, keep_zero_advantage=False)
    with_kl = deal_groups(0, groups, credits, ranks=2, temperature=1.0, keep_zero_advantage=True)
    assert set(dealt(without_kl)) == {("rl/00000000", 1)}
    assert set(dealt(with_kl)) == {("rl/00000000", 0), ("rl/00000000", 1)}  # never the unscored one


def test_the_samples_of_a_group_keep_their_order_on_every_rank() -> None:
    groups = [ready(g, [1.0] * 6, [9, 3, 7, 1, 8, 2]) for g in range(3)]
    credits = [credit([1.0] * 6, [1.0] * 6) for _ in groups]
    batch = deal_groups(0, groups, credits, ranks=2, temperature=1.0, keep_zero_advantage=False)
    for row in batch.rows:
        shares = [member for member in row if isinstance(member, Share)]
        assert [s.group_id for s in shares] == sorted(s.group_id for s in shares)
        for share in shares:
            assert [c.sample_index for c in share.credits] == sorted(c.sample_index for c in share.credits)


def test_a_step_without_any_gradient_gives_every_rank_an_empty_row() -> None:
    groups = [ready(0, [1.0, 1.0], [2, 2])]
    batch = deal_groups(
        3, groups, [credit([0.0, 0.0], [0.5, 0.5])], ranks=2, temperature=1.0, keep_zero_advantage=False
    )
    assert batch.rows == ((), ())


def test_shuffled_rewards_are_the_same_rewards_at_other_samples_and_never_an_unscored_one() -> None:
    groups = [ready(g, [float(4 * g + i) for i in range(3)] + [float("nan")], [1] * 4) for g in range(6)]
    shuffled = outcomes(groups, step=5, shuffled=True)
    before = np.concatenate([g.outcome.rewards for g in groups])
    after = np.concatenate([o.rewards for o in shuffled])
    assert np.array_equal(np.isnan(before), np.isnan(after))
    assert sorted(before[~np.isnan(before)]) == sorted(after[~np.isnan(after)])
    assert not np.array_equal(before, after, equal_nan=True)
    again = np.concatenate([o.rewards for o in outcomes(groups, step=5, shuffled=True)])
    assert np.array_equal(after, again, equal_nan=True)
    other_step = np.concatenate([o.rewards for o in outcomes(groups, step=6, shuffled=True)])
    assert not np.array_equal(after, other_step, equal_nan=True)


def test_rewards_are_left_alone_without_the_control() -> None:
    groups = [ready(0, [0.0, 1.0], [1, 1])]
    assert outcomes(groups, step=0, shuffled=False) == [groups[0].outcome]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_batch_names_every_group_once(ranks: int) -> None:
    groups = [ready(g, [1.0, 0.0], [2, 5]) for g in range(4)]
    credits = [credit([1.0, -1.0], [0.1, 0.1]) for _ in groups]
    batch = deal_groups(0, groups, credits, ranks=ranks, temperature=1.0, keep_zero_advantage=False)
    assert sorted(batch.group_ids) == [g.drawn.id for g in groups]
