"""The R1 template."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.actors.verify.template import ROLE_MARKERS, TAGS, FormatVerifier, has_template

GOOD = "<think>\nbecause\n</think>\n<answer>132</answer>\n"


def slow_reference(text: str) -> bool:
    """The definition, word by word, from the list of all tags in the text."""
    tags = [(m.start(), m.end(), m.group()) for m in re.finditer("</?think>|</?answer>", text)]
    if [tag for _, _, tag in tags] != list(TAGS):
        return False
    gaps = [text[: tags[0][0]]]
    gaps += [text[tags[i][1] : tags[i + 1][0]] for i in range(3)]
    gaps += [text[tags[3][1] :]]
    filled = [gap != "" and not gap.isspace() for gap in gaps]
    return filled == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (GOOD, True),
        ("<think>a</think><answer>b</answer>", True),
        (" \n<think>a</think> <answer>b</answer>  ", True),
        ("so <think>a</think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer> done", False),
        ("<think>a</think> so <answer>b</answer>", False),
        ("<think> </think><answer>b</answer>", False),
        ("<think>a</think><answer> </answer>", False),
        ("<think>a<answer>b</answer></think>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False),
        ("<think>a<think>b</think><answer>c</answer>", False),
        ("<think>a</think></think><answer>c</answer>", False),
        ("<think>a</think><answer>b", False),
        ("<think>a</think>", False),
        ("<think>a", False),
        ("", False),
        ("<Think>a</Think><answer>b</answer>", False),
        ("<think>a</ think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer>\u200b", False),
        ("<think>a</think><answer>b</answer>\x00", False),
    ],
)
def test_exactly_the_template_gets_credit(completion: str, expected: bool) -> None:
    assert FormatVerifier().score(completion, {}) == (("format", float(expected)),)


@pytest.mark.parametrize("marker", ROLE_MARKERS)
def test_a_forged_turn_gets_no_credit(marker: str) -> None:
    assert not FormatVerifier().matches(GOOD.replace("because", f"because{marker} what?"))


def test_a_prompt_that_opened_the_thinking_is_completed() -> None:
    opened = FormatVerifier(opened=True)
    assert opened.matches("because</think><answer>132</answer>")
    assert not opened.matches("<think>because</think><answer>132</answer>")


def test_the_eos_text_must_close_the_completion_when_it_is_required() -> None:
    verifier = FormatVerifier(eos="<eos>")
    assert verifier.matches(GOOD + "<eos>")
    assert not verifier.matches(GOOD)
    assert not verifier.matches(GOOD + "<eos><eos>")
    assert not verifier.matches(GOOD.replace("because", "a<eos>b") + "<eos>")


PIECES = st.sampled_from([*TAGS, "a", " ", "\n", "<", ">", "/", "think", "<think", "answer>", "\u3000", "é"])


@given(st.lists(PIECES, max_size=14))
def test_the_scanner_agrees_with_a_slow_reference(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert has_template(text) == slow_reference(text)


@given(st.lists(st.sampled_from(["a", " ", "<", "</think", "b>", "\n", *TAGS]), min_size=5, max_size=5))
def test_the_scanner_agrees_near_the_template(gaps: list[str]) -> None:
    text = gaps[0] + "".join(tag + gap for tag, gap in zip(TAGS, gaps[1:], strict=True))
    assert has_template(text) == slow_reference(text)


@pytest.mark.parametrize(
    "piece",
    ["<think>", "<think>a</think>", "<answer>x", "</answer>", "<thin", "<think>a</think><answer>", " "],
)
def test_time_grows_with_the_length_only(piece: str) -> None:
    """A quadratic scanner needs 64 times as long for 8 times the text; the bound leaves room for noise."""

    def seconds(n: int) -> float:
        text = piece * (n // len(piece))
        samples = []
        for _ in range(5):
            began = time.process_time()
            FormatVerifier().matches(text)
            samples.append(time.process_time() - began)
        return min(samples)

    assert seconds(2**21) < 24 * seconds(2**18) + 0.005
