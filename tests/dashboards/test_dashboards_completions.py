"""Completions as blocks."""

from __future__ import annotations

import time

import pytest

from treadle.dashboards.completions import Block, blocks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "<think>4+5=9</think><answer>9</answer><eos>",
            [("thinking", "4+5=9"), ("answer", "9"), ("token", "<eos>")],
        ),
        ("a <think>b", [("plain", "a "), ("thinking", "b")]),
        ("</think>x", [("token", "</think>"), ("plain", "x")]),
        ("<think>a</answer>b</think>", [("thinking", "a"), ("token", "</answer>"), ("thinking", "b")]),
        ("1 < 2 and <b>", [("plain", "1 < 2 and <b>")]),
        ("<|im_end|>", [("token", "<|im_end|>")]),
        ("", []),
        ("<think>\n</think>", []),
    ],
)
def test_tags_divide_a_completion(text: str, expected: list[tuple[str, str]]) -> None:
    assert blocks(text) == [Block(kind, part) for kind, part in expected]


def test_a_megabyte_of_broken_tags_takes_no_time() -> None:
    began = time.monotonic()
    found = blocks("<think>" * 150_000 + "<|" * 100_000)
    assert time.monotonic() - began < 5
    assert found[-1].text.endswith("<|")
