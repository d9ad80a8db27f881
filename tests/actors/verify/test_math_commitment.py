"""Which answer a completion commits to."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.actors.verify.commitment import committed_answer, expected_answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>\\boxed{4}</think>It is \\boxed{1} and \\boxed{2}.", "1, 2"),
        ("<think>\\boxed{4}</think><answer></answer>", ""),
        ("<think>\\boxed{4}</think><answer>5</answer>", "5"),
        ("First \\boxed{3}, no: \\boxed{4}", "4"),
        ("\\boxed{3} \\boxed{3}", "3"),
        ("\\boxed{1}, \\boxed{2}, \\text{ and } \\boxed{3}", "1, 2, 3"),
        ("x=\\boxed{1}, y_2=\\boxed{2}", "1, 2"),
        ("\\boxed{28}\\%", "28\\%"),
        ("$\\boxed{28}$ percent", "28\\%"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\fbox{5}", "5"),
        ("\\boxed {5}", "5"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} \\boxed{2", ""),
        ("\\boxed{1} \\boxed{}", ""),
        ("The answer is 5.", "5"),
        ("The answer is 5. I hope so.", "5"),
        ("**Answer:** $\\frac{1}{2}$", "\\frac{1}{2}"),
        ("Answer: -5", "-5"),
        ("Answer: 3\nFinal answer: 4\nThanks", "4"),
        ("The final answer is $3$ or $4$.", "3, 4"),
        ("Final Answer: The largest $n$ is 34.", "34"),
        ("Answer: it is 3 or it is 4", "it is 3 or it is 4"),
        ("所以答案是 5。", "5"),
        ("答案：$5$", "5"),
        ("We get $x=5$ here.", "x=5"),
        ("We get $28$ % here.", "28\\%"),
        ("$1$ and $2$", "1, 2"),
        ("$1$ but then $2$", ""),
        ("$1$ so $1$", "1"),
        ("$$ \n 9 \n $$", "9"),
        ("It costs $5", "It costs $5"),
        ("5", "5"),
        ("", ""),
    ],
)
def test_one_answer_or_none_is_found(completion: str, answer: str) -> None:
    assert committed_answer(completion) == answer


def test_contradicting_boxes_can_count_as_no_answer() -> None:
    assert committed_answer("\\boxed{3}, no: \\boxed{4}", last_box_counts=False) == ""
    assert committed_answer("\\boxed{3} and \\boxed{4}", last_box_counts=False) == "3, 4"
    assert committed_answer("\\boxed{3}, again \\boxed{3}", last_box_counts=False) == "3"


def test_the_expected_answer_has_no_region() -> None:
    assert expected_answer("a \\boxed{5} b") == "5"
    assert expected_answer("$5$") == "5"
    assert expected_answer("x < 5 and y > 3") == "x < 5 and y > 3"


HOSTILE = [
    "\\boxed{",
    "\\boxed{1}",
    "\\boxed{1},",
    "$",
    "\\(",
    "\\[",
    "answer is ",
    "Answer: $1$",
    "}",
    "{",
    "\\text{ ",
]
HOSTILE += ["* ", " ", "\\quad", "答案：", "\\boxed{\\boxed{", "$$", "1. ", "\u200b", " is "]


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_megabyte_of_anything_is_searched_at_once(piece: str) -> None:
    began = time.process_time()
    committed_answer(piece * (2**20 // len(piece)))
    assert time.process_time() - began < 1.0


@given(
    st.lists(st.sampled_from([*HOSTILE, "5", "x", "</think>", "<answer>", "</answer>", "\n"]), max_size=20)
)
def test_it_raises_nothing_and_answers_with_a_part_of_the_text(pieces: list[str]) -> None:
    answer = committed_answer("".join(pieces))
    assert len(answer) <= len("".join(pieces)) + 2 * len(pieces)
