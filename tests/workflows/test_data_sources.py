"""Prompts, pairs and corpora from generators and files: what is accepted, what is refused and how."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from treadle.platform.config import load
from treadle.platform.contracts import Prompts
from treadle.platform.errors import ConfigError, DataError
from treadle.workflows.data.batches import RowList, TokenRow, batches
from treadle.workflows.data.corpus import FileCorpusConfig, GeneratedCorpusConfig, TokenStream
from treadle.workflows.data.generators.addition import Addition
from treadle.workflows.data.generators.sorting import Sorting
from treadle.workflows.data.pairs import FilePairsConfig, GeneratedPairsConfig
from treadle.workflows.data.prompts import FilePromptsConfig, GeneratedPromptsConfig
from treadle.workflows.data.registry import CORPORA, PAIRS, PROMPTS
from treadle.workflows.data.tokenization import character_tokenizer

TOKENIZER = character_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789+=,;:{} ")
GOOD = {"prompt": "2+2=", "answer": "4"}


def jsonl(folder: Path, *rows: Any, name: str = "rows.jsonl") -> str:
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def file_prompts(url: str, split: str = "all", limit: int | None = None, **settings: Any) -> Any:
    return FilePromptsConfig(url=url, **settings).build(
        TOKENIZER, split=split, seed=1, max_prompt_tokens=limit
    )


def test_generated_prompts_fulfil_the_contract_and_carry_the_gold_answer() -> None:
    prompts = GeneratedPromptsConfig().build(TOKENIZER, split="train", seed=3, max_prompt_tokens=8)
    assert isinstance(prompts, Prompts)
    assert len(prompts) > 8000
    first = prompts.at(0)
    a, b = first.text.removesuffix("=").split("+")
    assert first.payload == {"answer": str(int(a) + int(b))}
    assert first.id == f"addition-{a}+{b}"
    assert first.verifier == "exact"
    assert prompts.verifiers == {"exact"}
    assert first.token_ids.dtype == np.int32
    assert TOKENIZER.decode(first.token_ids) == first.text


def test_the_same_index_gives_the_same_prompt_in_another_process_life() -> None:
    one = GeneratedPromptsConfig().build(TOKENIZER, split="train", seed=3)
    other = GeneratedPromptsConfig().build(TOKENIZER, split="train", seed=3)
    for index in (0, 7, len(one) - 1, len(one), 5 * len(one) + 3):
        assert one.at(index).id == other.at(index).id


def test_prompts_too_long_for_the_context_are_named() -> None:
    config = GeneratedPromptsConfig(generator=Sorting())
    with pytest.raises(DataError, match=r"Prompt sorting-\S+ has \d+ tokens.*max_new_tokens leaves 9"):
        config.build(TOKENIZER, split="train", seed=0, max_prompt_tokens=9)


def test_a_template_surrounds_the_prompt_and_other_braces_are_text() -> None:
    config = GeneratedPromptsConfig(template="q: {prompt} {x}")
    assert config.build(TOKENIZER, split="train", seed=0).at(0).text.startswith("q: ")
    assert config.build(TOKENIZER, split="train", seed=0).at(0).text.endswith("= {x}")
    with pytest.raises(ConfigError, match="template"):
        GeneratedPromptsConfig(template="nothing").check()


def test_file_prompts_keep_ids_payloads_and_verifiers(tmp_path: Path) -> None:
    url = jsonl(
        tmp_path,
        {"id": "a", "prompt": "one", "answer": "1", "verifier": "numeric"},
        {"id": 7, "prompt": "two", "payload": {"numbers": [1, 2], "target": 3}},
        {"prompt": "three", "answer": 3, "payload": {"ignore_case": True}},
    )
    prompts = file_prompts(url, verifier="math")
    assert prompts.verifiers == {"numeric", "math"}
    found = {p.text: p for p in (prompts.at(i) for i in range(3))}
    assert (found["one"].id, found["one"].verifier, found["one"].payload) == ("a", "numeric", {"answer": "1"})
    assert (found["two"].id, found["two"].verifier) == ("7", "math")
    assert found["three"].payload == {"answer": 3, "ignore_case": True}
    assert found["three"].id.startswith("prompt-")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "x", "answer": ', "not valid JSON"),
        ("[1, 2]", "no JSON object"),
        ('{"answer": "4"}', '"prompt" is missing'),
        ('{"prompt": 5, "answer": "4"}', '"prompt" is 5'),
        ('{"prompt": "  ", "answer": "4"}', '"prompt" is'),
        ('{"prompt": "x"}', 'neither "answer" nor "payload"'),
        ('{"prompt": "x", "answer": " "}', '"answer" is empty'),
        ('{"prompt": "x", "payload": 3}', '"payload" must be an object'),
        ('{"prompt": "x", "answer": "4", "id": true}', '"id" is True'),
        ('{"prompt": "x", "answer": "4", "verifier": 1}', '"verifier" is 1'),
        ('{"prompt": "2+2=", "answer": "5"}', r"already used at .*rows\.jsonl:1"),
    ],
)
def test_a_broken_row_is_named_with_file_and_line_or_counted(
    tmp_path: Path, line: str, complaint: str
) -> None:
    url = jsonl(tmp_path, GOOD, "", line, {"prompt": "3+3=", "answer": "6"})
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{complaint}") as caught:
        file_prompts(url)
    assert "skip_bad" in caught.value.remedy
    prompts = file_prompts(url, skip_bad=True)
    assert prompts.skipped == 1
    assert len(prompts) == 2


def test_missing_empty_and_hopeless_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        file_prompts(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="does not exist or is no file"):
        file_prompts(str(tmp_path))
    with pytest.raises(DataError, match="is empty"):
        file_prompts(jsonl(tmp_path, "", "  "))
    with pytest.raises(DataError, match=r"no verifiable prompt.*0 usable rows, 2 broken"):
        file_prompts(jsonl(tmp_path, "{", "}"), skip_bad=True)
    with pytest.raises(DataError, match="no verifiable prompt in its heldout part"):
        file_prompts(jsonl(tmp_path, GOOD), split="heldout", heldout_fraction=0.0)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl cannot be read"):
        file_prompts(str(tmp_path / "latin.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x", "answer": "1"}' * 50)[:-9])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz cannot be read"):
        file_prompts(str(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "fake.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"fake\.parquet cannot be read"):
        file_prompts(str(tmp_path / "fake.parquet"))


def test_long_and_foreign_prompts_of_a_file_are_named_before_anything_runs(tmp_path: Path) -> None:
    url = jsonl(tmp_path, GOOD, {"id": "big", "prompt": "12345678901", "answer": "4"})
    with pytest.raises(DataError, match=r"Prompt big has 11 tokens.* leaves 10"):
        file_prompts(url, limit=10)
    url = jsonl(tmp_path, GOOD, {"id": "odd", "prompt": "2§2=", "answer": "4"})
    with pytest.raises(DataError, match=r"prompt odd: the tokenizer has no token for '§'"):
        file_prompts(url)


def test_files_are_read_from_any_place_and_form(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(20)]
    expected = {row["prompt"] for row in rows}
    with fsspec.open("memory://bucket/rows.jsonl", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as packed:
        packed.write("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for url in (
        "memory://bucket/rows.jsonl",
        str(tmp_path / "rows.jsonl.gz"),
        f"file://{tmp_path}/rows.parquet",
    ):
        prompts = file_prompts(url)
        assert {prompts.at(i).text for i in range(20)} == expected


def test_a_broken_parquet_row_is_named_by_its_number(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["1+1=", None], "answer": ["2", "3"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r'rows\.parquet:2: the field "prompt" is missing'):
        file_prompts(str(tmp_path / "rows.parquet"))


def test_the_parts_of_a_file_are_disjoint_whatever_the_order_of_its_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(300)]
    held = file_prompts(jsonl(tmp_path, *rows), split="heldout")
    train = file_prompts(jsonl(tmp_path, *rows[::-1]), split="train")
    held_ids = {held.at(i).id for i in range(len(held))}
    train_ids = {train.at(i).id for i in range(len(train))}
    assert len(held_ids) + len(train_ids) == 300
    assert not held_ids & train_ids
    assert 10 < len(held_ids) < 60


def stream(**settings: Any) -> TokenStream:
    return GeneratedCorpusConfig(tokens=5000, **settings).build(TOKENIZER, context_tokens=33, seed=5)


def test_a_generated_corpus_is_packed_reproducible_and_resumable_by_index() -> None:
    one, other = stream(), stream()
    row = one.at(4)
    assert len(row.token_ids) == 33
    assert row.loss_mask.tolist() == [False] + [True] * 32
    for index in (0, len(one) - 1, 3 * len(one) + 2):
        np.testing.assert_array_equal(one.at(index).token_ids, other.at(index).token_ids)
    assert not np.array_equal(one.at(0).token_ids, one.at(len(one)).token_ids)


def test_every_token_of_a_stream_is_a_target_once_an_epoch() -> None:
    tokens = np.arange(2, 2 + 1 + 7 * 4, dtype=np.int32)
    blocks = TokenStream(tokens, context_tokens=5, seed=0)
    targets = [t for i in range(len(blocks)) for t in blocks.at(i).token_ids[blocks.at(i).loss_mask]]
    assert sorted(targets) == tokens[1:].tolist()


def test_documents_begin_with_bos_and_end_with_eos(tmp_path: Path) -> None:
    url = jsonl(tmp_path, {"text": "ab"}, {"text": "c"}, {"text": "def"})
    blocks = FileCorpusConfig(urls=[url]).build(TOKENIZER, context_tokens=4, seed=0)
    assert TOKENIZER.decode(blocks.tokens) == "<bos>ab<eos><bos>c<eos><bos>def<eos>"
    plain = tmp_path / "lines.txt"
    plain.write_text("ab\nc\ndef\n")
    again = FileCorpusConfig(urls=[str(plain)]).build(TOKENIZER, context_tokens=4, seed=0)
    np.testing.assert_array_equal(again.tokens, blocks.tokens)


def test_broken_documents_and_foreign_characters_are_named_by_line(tmp_path: Path) -> None:
    url = jsonl(tmp_path, {"text": "ab"}, {"body": "c"})
    with pytest.raises(DataError, match=r'rows\.jsonl:2: the field "text" is missing'):
        FileCorpusConfig(urls=[url]).build(TOKENIZER, context_tokens=3, seed=0)
    skipping = FileCorpusConfig(urls=[url], skip_bad=True).build(TOKENIZER, context_tokens=3, seed=0)
    assert skipping.skipped == 1
    url = jsonl(tmp_path, {"text": "ab"}, {"text": "a§b"})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the tokenizer has no token for '§'"):
        FileCorpusConfig(urls=[url]).build(TOKENIZER, context_tokens=3, seed=0)
    with pytest.raises(DataError, match="less than one block"):
        FileCorpusConfig(urls=[jsonl(tmp_path, {"text": "ab"})]).build(TOKENIZER, context_tokens=30, seed=0)


def test_cold_start_pairs_mask_the_prompt_and_target_the_chain_and_eos() -> None:
    rows = GeneratedPairsConfig(pairs=50).build(TOKENIZER, context_tokens=64, seed=2)
    assert len(rows) == 50
    row = rows.at(3)
    prompt = TOKENIZER.decode(row.token_ids[~row.loss_mask])
    target = TOKENIZER.decode(row.token_ids[row.loss_mask])
    assert prompt.endswith("=")
    assert target.startswith("<think>")
    assert target.endswith("</answer><eos>")
    held = GeneratedPromptsConfig().build(TOKENIZER, split="heldout", seed=9)
    asked = {held.at(i).text for i in range(len(held))}
    assert prompt not in asked


def test_pairs_of_a_file_are_checked_like_prompts(tmp_path: Path) -> None:
    url = jsonl(
        tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": "a"}, {"prompt": "a" * 9, "completion": "b"}
    )
    with pytest.raises(DataError, match=r'rows\.jsonl:2: the field "completion" is missing'):
        FilePairsConfig(url=url).build(TOKENIZER, context_tokens=8, seed=0)
    rows = FilePairsConfig(url=url, skip_bad=True).build(TOKENIZER, context_tokens=8, seed=0)
    assert (len(rows), rows.skipped) == (1, 2)
    url = jsonl(tmp_path, {"prompt": "a" * 9, "completion": "b"})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: prompt and completion have 11 tokens.*context is 8"):
        FilePairsConfig(url=url).build(TOKENIZER, context_tokens=8, seed=0)


@pytest.mark.parametrize(("union", "members"), [("prompts", PROMPTS), ("corpus", CORPORA), ("pairs", PAIRS)])
def test_recipes_choose_sources_and_generators_by_kind(union: str, members: dict[str, type]) -> None:
    config: Any = load(
        members["generator"], {"kind": "generator"}, ["generator.kind=sorting", "generator.length=3"]
    )
    assert config.generator == Sorting(length=3)
    with pytest.raises(ConfigError, match=r"generator.*digits"):
        load(members["generator"], {}, ["generator.digits=1"])
    with pytest.raises(ConfigError, match="heldout_fraction"):
        load(members["generator"], {}, ["heldout_fraction=1.5"])
    assert load(members["generator"], {}).generator == Addition()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "make",
    [
        lambda: GeneratedCorpusConfig(tokens=3000).build(TOKENIZER, context_tokens=17, seed=1),
        lambda: GeneratedPairsConfig(pairs=40).build(TOKENIZER, context_tokens=64, seed=1),
    ],
)
def test_a_resumed_run_gets_the_batches_an_uninterrupted_one_would_get(
    make: Callable[[], RowList | TokenStream],
) -> None:
    whole = batches(make(), rows_per_step=6, ranks=2)
    before = [whole(step) for step in range(20)]
    resumed = batches(make(), rows_per_step=6, ranks=2)
    for step in (13, 19):
        for a, b in zip(before[step].rows, resumed(step).rows, strict=True):
            assert [m.token_ids.tolist() for m in a] == [m.token_ids.tolist() for m in b]  # type: ignore[union-attr]


def test_row_lists_are_endless_and_refuse_to_be_empty() -> None:
    row = TokenRow(token_ids=np.zeros(3, np.int32), loss_mask=np.array([False, True, True]))
    assert RowList([row], seed=0).at(10**9) is row
    with pytest.raises(DataError, match="no row"):
        RowList([], seed=0)
