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


@pytest.mark.parametrize("unseen", ["\u200b", "\u2060\ufeff", "\u200e \u00ad"])
def test_a_block_of_marks_that_do_not_show_is_empty(unseen: str) -> None:
    assert not has_template(f"<think>{unseen}</think><answer>b</answer>")
    assert not has_template(f"<think>a</think><answer>{unseen}</answer>")
    assert has_template(f"<think>a{unseen}</think><answer>b</answer>")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>because</think>It is \\boxed{5}.", True),
        ("\n<think>because</think>\n\nIt is 5.\n", True),
        ("<think>because</think>", False),
        ("<think>because</think> \n", False),
        ("<think> </think>5", False),
        ("so <think>because</think>5", False),
        ("<think>because</think>5<think>more</think>", False),
        ("<think>because</think></think>5", False),
        ("<think>because</think><answer>5</answer>", False),
        ("<think>because</think>5\nUser: thanks", False),
        ("because", False),
    ],
)
def test_r1_itself_answers_without_tags(completion: str, expected: bool) -> None:
    assert FormatVerifier(answer_tags=False).matches(completion) == expected


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


class Visited(str):
    """Text that counts the characters that were looked at, by any of the operations that the scanner uses."""

    visits = 0

    def find(self, tag: str, begin: int = 0) -> int:  # type: ignore[override]
        found = super().find(tag, begin)
        Visited.visits += (len(self) if found < 0 else found + len(tag)) - begin
        return found

    def __getitem__(self, index: slice) -> "Visited":  # type: ignore[override]
        piece = Visited(super().__getitem__(index))
        Visited.visits += len(piece)
        return piece

    def strip(self, *_: object) -> "Visited":  # type: ignore[override]
        Visited.visits += len(self)
        return Visited(super().strip())

    def __contains__(self, tag: object) -> bool:
        Visited.visits += len(self)
        return super().__contains__(tag)  # type: ignore[operator]


def visits(text: str, answer_tags: bool) -> int:
    Visited.visits = 0
    has_template(Visited(text), answer_tags)
    return Visited.visits


@given(st.lists(PIECES, min_size=1, max_size=8), st.sampled_from([1, 4, 16]), st.booleans())
def test_twice_the_text_is_at_most_twice_the_visits(pieces: list[str], times: int, answer_tags: bool) -> None:
    """`times` copies against twice as many, each within the template, so that the scanner goes all the way."""
    once, twice = (
        max(visits(text, answer_tags) for text in (body, f"<think>{body}</think><answer>{body}</answer>"))
        for body in ("".join(pieces) * times, "".join(pieces) * 2 * times)
    )
    assert once > 0
    assert twice <= 2 * once + 100
    assert once <= 24 * (2 * len("".join(pieces)) * times + 40)


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
