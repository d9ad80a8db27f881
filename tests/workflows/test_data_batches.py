"""Supervised batches: one denominator, dealt evenly; and tokenizers."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from treadle.platform.errors import ConfigError, DataError
from treadle.platform.records import TrainSample
from treadle.workflows.data.batches import TokenRow, longest_first, supervised_batch
from treadle.workflows.data.corpus import GeneratedCorpusConfig
from treadle.workflows.data.prompts import GeneratedPromptsConfig
from treadle.workflows.data.tokenization import (
    TAGS,
    character_tokenizer,
    encode,
    encode_many,
    load_tokenizer,
    require_eos,
)


def row(length: int, prompt: int = 1) -> TokenRow:
    return TokenRow(token_ids=np.arange(length, dtype=np.int32), loss_mask=np.arange(length) >= prompt)


lengths = st.lists(st.integers(2, 60), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(sizes=lengths, ranks=st.integers(1, 5))
def test_however_rows_are_dealt_the_weighted_sum_is_the_mean_over_targets(
    sizes: list[int], ranks: int
) -> None:
    rows = [row(n, prompt=1 + n // 3) for n in sizes]
    batch = supervised_batch(rows, ranks=ranks, step=4)
    samples = [m for share in batch.rows for m in share if isinstance(m, TrainSample)]
    assert len(batch.rows) == ranks
    assert len(samples) == len(rows)
    losses = {id(s.token_ids): np.sqrt(s.token_ids + 1.0) for s in samples}
    dealt = sum((s.weights * s.advantages * losses[id(s.token_ids)])[s.loss_mask].sum() for s in samples)
    plain = np.concatenate([np.sqrt(r.token_ids + 1.0)[r.loss_mask] for r in rows]).mean()
    assert dealt == pytest.approx(plain, rel=1e-6)


@settings(max_examples=80, deadline=None)
@given(sizes=lengths, ranks=st.integers(1, 5))
def test_longest_first_deals_everything_once_and_within_grahams_bound(sizes: list[int], ranks: int) -> None:
    dealt = longest_first(sizes, ranks)
    assert sorted(i for share in dealt for i in share) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in share) for share in dealt]
    best = max(max(sizes), sum(sizes) / ranks)
    assert max(loads) <= 4 / 3 * best + max(sizes) / 3
    assert dealt == longest_first(sizes, ranks)


def test_two_ranks_get_equal_work_where_that_is_possible() -> None:
    dealt = longest_first([10, 2, 8, 4, 6, 6], 2)
    assert [sum([10, 2, 8, 4, 6, 6][i] for i in share) for share in dealt] == [18, 18]


def test_a_step_without_targets_is_refused() -> None:
    with pytest.raises(DataError, match="Step 3 has no target"):
        supervised_batch([row(4, prompt=4)], ranks=1, step=3)


def test_impossible_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="mask of 2"):
        TokenRow(token_ids=np.zeros(3, np.int32), loss_mask=np.zeros(2, bool))
    with pytest.raises(ValueError, match="first token"):
        row(3, prompt=0)


ALPHABET = "0123456789+=, \nab"


def test_characters_and_tags_are_one_token_each_and_decode_exactly() -> None:
    tokenizer = character_tokenizer(ALPHABET)
    text = "<think>1+1=2,\n a b</think><answer> 2</answer>"
    ids = encode(tokenizer, text, "here")
    assert len(ids) == len("1+1=2,\n a b 2") + 4
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id]) == text + "<eos>"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, 0], skip_special_tokens=True) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert len(tokenizer) == len(ALPHABET) + 3 + len(TAGS)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from([*ALPHABET, *TAGS]), max_size=30))
def test_any_text_of_the_alphabet_survives_encoding_and_decoding(parts: list[str]) -> None:
    tokenizer = SHARED
    text = "".join(parts)
    ids = encode(tokenizer, text, "here")
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == parts


SHARED = character_tokenizer(ALPHABET)


def test_a_saved_tokenizer_comes_back_the_same_through_auto_tokenizer(tmp_path: Path) -> None:
    SHARED.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "<think>1+1\n=2</think><answer>2</answer><eos>"
    assert loaded(text)["input_ids"] == SHARED(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (1, 0, len(SHARED))
    batch = loaded(["1", "1+1"], padding=True, return_tensors="pt")
    assert isinstance(batch["input_ids"], torch.Tensor)


def test_a_foreign_character_is_refused_by_name_and_never_becomes_unknown() -> None:
    with pytest.raises(DataError, match=r"row 7: .* no token for 'x', 'é'"):
        encode(SHARED, "1x+é<think>", "row 7")
    with pytest.raises(DataError, match=r"row 1: .*'y'"):
        encode_many(SHARED, ["1", "y", "z"], lambda i: f"row {i}")
    lossy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "<eos>": 2}, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="<eos>",
    )
    with pytest.raises(DataError, match="'b'"):
        encode(lossy, "b", "row 0")


def test_alphabets_with_a_repeated_character_are_refused() -> None:
    with pytest.raises(ConfigError, match="'a' more than once"):
        character_tokenizer("aba")


def test_a_tokenizer_without_eos_is_refused_with_the_line_to_add(tmp_path: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    bare.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no EOS") as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in caught.value.message
    assert "eos_token" in caught.value.remedy
    with pytest.raises(DataError, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path / "nowhere"))
    assert require_eos(SHARED, "here") == 1


def test_two_hundred_thousand_corpus_tokens_and_all_prompts_take_under_two_seconds() -> None:
    """Processor time, so that a busy machine does not decide."""
    tokenizer = character_tokenizer(GeneratedCorpusConfig().generator.alphabet)
    start = time.process_time()
    corpus = GeneratedCorpusConfig(tokens=200_000).build(tokenizer, context_tokens=64, seed=123)
    prompts = GeneratedPromptsConfig().build(tokenizer, split="train", seed=123, max_prompt_tokens=16)
    assert len(corpus.tokens) >= 200_000
    assert len(prompts) > 8000
    assert time.process_time() - start < 2
