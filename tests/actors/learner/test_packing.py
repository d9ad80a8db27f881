"""Packing: every target exactly once, budgets kept, the same input always the same micro-batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.actors.learner.ranks import drawn_samples

from treadle.actors.learner.layout import PackedLayout
from treadle.actors.learner.packing import dummy_batch, pack
from treadle.platform.records import TrainSample

CPU = torch.device("cpu")


def numbered(lengths: list[int]) -> list[TrainSample]:
    """Token t of sample i is 100*i + t, so that a token tells where it came from."""
    return [
        TrainSample(
            token_ids=np.arange(100 * i, 100 * i + n, dtype=np.int32),
            loss_mask=np.arange(n) >= 2,
            advantages=np.full(n, i, dtype=np.float32),
            weights=np.full(n, 0.5, dtype=np.float32),
            behaviour_logprobs=-np.arange(n, dtype=np.float32),
        )
        for i, n in enumerate(lengths)
    ]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(3, 60), min_size=1, max_size=40), budget=st.integers(1, 150))
def test_every_target_is_packed_once_behind_the_token_that_predicts_it(
    lengths: list[int], budget: int
) -> None:
    seen = []
    for batch in pack(numbered(lengths), budget):
        assert sum(batch.layout.lengths) == len(batch.input_ids) == len(batch.position_ids)
        assert len(batch.input_ids) <= budget or batch.n_sequences == 1
        assert (batch.input_ids[batch.target_index] + 1 == batch.targets).all()
        assert (batch.position_ids == batch.input_ids % 100).all()
        owner = batch.targets // 100
        assert (torch.tensor(batch.samples)[batch.sequence] == owner).all()
        assert (batch.advantages == owner).all()
        assert batch.behaviour_logprobs is not None
        assert (batch.behaviour_logprobs == -(batch.targets % 100)).all()
        seen += batch.targets.tolist()
    expected = [100 * i + t for i, n in enumerate(lengths) for t in range(2, n)]
    assert sorted(seen) == expected


def test_the_same_samples_always_give_the_same_micro_batches() -> None:
    first, second = (pack(drawn_samples(30, seed=1), 64) for _ in range(2))
    assert [b.samples for b in first] == [b.samples for b in second]


def test_packing_is_tight() -> None:
    """Best-fit decreasing stays within 11/9 of the optimum, which is at least total / budget."""
    samples = drawn_samples(200, seed=2, longest=60)
    total = sum(len(s.token_ids) - 1 for s in samples)
    assert len(pack(samples, 128)) <= np.ceil(11 / 9 * total / 128)


def test_a_sequence_longer_than_the_budget_gets_a_micro_batch_of_its_own() -> None:
    batches = pack(numbered([50, 5, 5]), 10)
    assert [b.samples for b in batches] == [(0,), (1, 2)]


def test_sequences_without_targets_are_left_out() -> None:
    empty = replace(numbered([6])[0], loss_mask=np.zeros(6, dtype=np.bool_))
    assert pack([empty], 100) == []
    assert [b.samples for b in pack([empty, numbered([6])[0]], 100)] == [(1,)]


def test_one_supervised_sequence_leaves_no_behaviour_log_probabilities() -> None:
    drawn, supervised = numbered([6, 6])
    batch = pack([drawn, replace(supervised, behaviour_logprobs=None)], 100)[0]
    assert batch.behaviour_logprobs is None


def test_a_dummy_has_weight_zero_and_says_so() -> None:
    dummy = dummy_batch()
    assert dummy.is_dummy
    assert dummy.weights.tolist() == [0.0]
    assert not pack(numbered([5]), 10)[0].is_dummy


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 80), min_size=1, max_size=30))
def test_laying_sequences_out_as_rectangles_and_back_loses_nothing(lengths: list[int]) -> None:
    layout = PackedLayout.apart(lengths, CPU)
    row = torch.arange(layout.total)
    assert (row[layout.padded_index].reshape(-1)[layout.packed_index] == row).all()
    flat = torch.cat([row[bucket].reshape(-1) for bucket in layout.buckets])
    assert (flat[layout.bucket_places] == row).all()
    assert layout.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()


def test_buckets_of_a_long_tailed_batch_hold_little_padding() -> None:
    lengths = [250, 240] + [20] * 60
    layout = PackedLayout.apart(lengths, CPU)
    cells = sum(bucket.numel() for bucket in layout.buckets)
    assert cells < 1.1 * layout.total
    assert layout.padded_index.numel() > 8 * layout.total


def of_one_prompt(prompt: list[int], completions: list[int]) -> list[TrainSample]:
    """Completions of so many tokens behind the same prompt; completion i holds 100 * i + t."""
    return [
        TrainSample(
            token_ids=np.array([*prompt, *range(100 * i, 100 * i + n)], dtype=np.int32),
            loss_mask=np.arange(len(prompt) + n) >= len(prompt),
            advantages=np.full(len(prompt) + n, i, dtype=np.float32),
            weights=np.ones(len(prompt) + n, dtype=np.float32),
            behaviour_logprobs=None,
        )
        for i, n in enumerate(completions, start=1)
    ]


def test_a_groups_prompt_is_packed_once_and_predicts_every_first_token() -> None:
    (batch,) = pack(of_one_prompt([7, 8, 9], [4, 1, 3]), 100)
    assert batch.input_ids.tolist() == [7, 8, 9, 100, 101, 102, 300, 301]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 3, 4]
    assert batch.layout.lengths == (6, 5, 3)
    assert batch.targets.tolist() == [100, 101, 102, 103, 300, 301, 302, 200]
    assert batch.input_ids[batch.target_index].tolist() == [9, 100, 101, 102, 9, 300, 301, 9]
    assert batch.advantages.tolist() == [1.0] * 4 + [3.0] * 3 + [2.0]


def test_a_prompt_is_shared_within_a_micro_batch_and_samples_go_where_theirs_lies() -> None:
    first, second = of_one_prompt([7] * 10, [10, 10]), of_one_prompt([8] * 10, [10, 10])
    batches = pack([first[0], second[0], first[1], second[1]], 30)
    assert [b.samples for b in batches] == [(0, 2), (1, 3)]
    assert [len(b.input_ids) for b in batches] == [28, 28]


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 6), st.lists(st.integers(1, 20), min_size=1, max_size=5)), max_size=6
    ),
    budget=st.integers(1, 80),
)
def test_every_sequence_is_whole_wherever_its_prompt_lies(
    groups: list[tuple[int, list[int]]], budget: int
) -> None:
    samples = [s for g, (p, sizes) in enumerate(groups) for s in of_one_prompt([1000 + g] * p, sizes)]
    seen = []
    for batch in pack(samples, budget):
        assert len(batch.input_ids) <= budget or batch.n_sequences == 1
        layout, ids = batch.layout, batch.input_ids
        whole = [samples[i].token_ids[:-1] for i in batch.samples]
        assert ids[layout.in_sequence].tolist() == np.concatenate(whole).tolist()
        assert [
            row[:n].tolist() for row, n in zip(ids[layout.padded_index], layout.lengths, strict=True)
        ] == [tokens.tolist() for tokens in whole]
        for laid_out, back in (
            (layout.in_sequence, layout.from_sequence),
            (layout.padded_index.reshape(-1), layout.packed_index),
            (torch.cat([bucket.reshape(-1) for bucket in layout.buckets]), layout.bucket_places),
        ):
            assert laid_out[back].tolist() == list(range(layout.total))
        seen += batch.samples
    assert sorted(seen) == list(range(len(samples)))
