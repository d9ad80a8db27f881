"""Where the answer stands."""

import time

import pytest

from treadle.actors.verify.answer import answer_region, boxless, last_box, plain, without_eos


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>5 or 6</think><answer> 6 </answer>", "6"),
        ("<think>x</think> 6", "6"),
        ("so \\boxed{5} and \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("132", "132"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("<think>\\boxed{5}</think><answer></answer>", ""),
        ("<think>\\boxed{5}</think>", ""),
        ("<think><answer>5</answer></think>6", "6"),
        ("<think>a</think><answer>13", ""),
        ("<answer>1</answer><answer>2", ""),
        ("", ""),
    ],
)
def test_the_answer_is_read_from_its_region_only(completion: str, answer: str) -> None:
    assert answer_region(completion) == answer


def test_a_box_that_never_closes_is_no_answer() -> None:
    assert last_box("\\boxed{1} \\boxed{2") == ""
    assert boxless("the answer is \\boxed{ \\sqrt{2} }.") == "\\sqrt{2}"


def test_a_megabyte_of_boxes_or_tags_is_read_in_linear_time() -> None:
    for piece in ("\\boxed{", "\\boxed{1}", "<answer>", "</think>", "<think><answer>"):
        began = time.process_time()
        answer_region(piece * (2**20 // len(piece)))
        assert time.process_time() - began < 1.0, piece


def test_the_eos_text_is_taken_off_once() -> None:
    assert without_eos("132<eos>", "<eos>") == "132"
    assert without_eos("132<eos><eos>", "<eos>") == "132<eos>"
    assert without_eos("132", "") == "132"


def test_spelling_is_unified_but_meaning_is_not() -> None:
    assert plain("  a \n b\t") == "a b"
    assert plain("１３２") == "132"
    assert plain("−5") == "-5"
    assert plain("10²") != plain("102")
    assert plain("13\u200b2") != plain("132")
    assert plain("\u202e231") != plain("132")
