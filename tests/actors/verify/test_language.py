"""The share of the thinking that is in the wanted language."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.actors.verify.language import SCRIPTS, LanguageVerifier
from treadle.actors.verify.words import prose, thinking, words
from treadle.platform.errors import ConfigError, DataError
from treadle.platform.records import Json


def share(text: str, target: str, **payload: Json) -> float:
    ((name, value),) = LanguageVerifier(target=target).score(text, payload)
    assert name == "language"
    return value


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        ("<think>so 所以 it is 5</think>5", "en", 0.6),
        ("<think>so 所以 it is 5</think>5", "zh", 0.4),
        ("<think>We add both numbers.</think>", "en", 1.0),
        ("<think>Nous additionnons les deux nombres, voilà.</think>", "fr", 1.0),
        ("<think>Wir addieren beide Zahlen, größer.</think>", "de", 1.0),
        ("<think>Sumamos los dos números, señor.</think>", "es", 1.0),
        ("<think>Сложим оба числа и проверим.</think>", "ru", 1.0),
        ("<think>نجمع العددين ثم نتحقق</think>", "ar", 1.0),
        ("<think>两个数相加，等于五。</think>", "zh", 1.0),
        ("<think>二つの数を足すとゴになる</think>", "ja", 1.0),
        ("<think>두 수를 더하면 오가 된다</think>", "ko", 1.0),
        ("<think>두 수를 더하면 then five</think>", "ko", 0.6),
        ("<think>二つの数を足す</think>", "zh", 3 / 7),
        ("<think>两个数相加</think>", "ja", 1.0),
        ("<think>We add.</think>", "zh", 0.0),
        ("<think>Сложим</think>", "en", 0.0),
        ("<think>हम जोड़ते हैं</think>", "en", 0.0),
    ],
)
def test_words_of_the_target_are_counted(text: str, target: str, expected: float) -> None:
    assert share(text, target) == expected


@pytest.mark.parametrize(
    "noise",
    [
        "$x + y = answer$",
        "$$\\int f(x) dx$$",
        "\\[ total = sum \\]",
        "\\(because\\)",
        "\\boxed{seven}",
        "\\begin{align*} left &= right \\end{align*}",
        "\\frac \\alpha \\text",
        "```python\nprint(hello)\n```",
        "`some_name`",
        "https://example.org/words/here?and=more",
        "www.example.org/words",
        "<tool_call>",
        "<|im_start|>",
        "x1 a_n 3cm 42 snake_case",
        "x y n",
        "sin cos log",
        "α β",
    ],
)
def test_formulas_code_links_and_names_are_no_words(noise: str) -> None:
    assert share(f"<think>两个 {noise} 数</think>", "zh") == 1.0
    assert share(f"<think>{noise}</think>", "zh") == 0.5


def test_what_only_looks_like_a_formula_stays() -> None:
    assert list(words("it costs $5 and more")) == ["it", "costs", "and", "more"]
    assert list(words("an \\[ open bracket")) == ["an", "open", "bracket"]
    assert list(words("if it < that then")) == ["if", "it", "that", "then"]
    assert prose("a $b$ c").split() == ["a", "c"]


def test_only_the_thinking_counts() -> None:
    assert thinking("<think>one</think>two</think>three") == "<think>one</think>two"
    assert thinking("one<answer>two</answer>") == "one"
    assert thinking("one") == "one"
    assert share("<think>两个</think>This is long and English.", "zh") == 1.0


def test_a_thinking_without_words_is_neutral_and_the_value_is_a_setting() -> None:
    assert share("", "en") == 0.5
    assert share("<think>1+1=2</think>", "en") == 0.5
    assert LanguageVerifier(target="en", neutral=0.0).share("<think> </think>", "en") == 0.0


def test_the_payload_chooses_before_the_run() -> None:
    assert share("<think>两个</think>", "en", language="zh") == 1.0
    assert LanguageVerifier().score("<think>two</think>", {"language": "en"}) == (("language", 1.0),)


def test_a_programming_language_in_the_payload_is_no_target() -> None:
    assert share("<think>two</think>", "en", language="python") == 1.0


@pytest.mark.parametrize("payload", [{}, {"language": "xx"}, {"language": 3}, {"language": None}])
def test_no_known_target_is_a_failure_and_no_zero(payload: dict[str, Json]) -> None:
    with pytest.raises(DataError, match="target"):
        LanguageVerifier().score("<think>two</think>", payload)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="target='xx'"):
        LanguageVerifier(target="xx")
    with pytest.raises(ConfigError, match="neutral=2"):
        LanguageVerifier(target="en", neutral=2.0)


PIECES = [
    "<think>",
    "</think>",
    "$",
    "\\[",
    "```",
    "`",
    "<a ",
    ">",
    "\\begin{x}",
    "\\boxed{",
    "word ",
    "字",
    "か",
    "\n",
]


@pytest.mark.parametrize(
    "piece", [*PIECES, "<a <", "`a\n", "$a\n", "\\(", "http://a ", "a", "a\u0300\u0316", "\ud800"]
)
def test_a_megabyte_takes_a_moment(piece: str) -> None:
    """The plainest text of this length takes a tenth of a second; a quadratic scan would take minutes."""
    began = time.process_time()
    share(piece * (2**18 // len(piece)) + "\n>", "en")
    assert time.process_time() - began < 1.0


def test_a_thousand_tokens_take_less_than_a_few_milliseconds() -> None:
    text = "<think>" + "We add $x_1$ and the other number, so that 两 is less. " * 75 + "</think>"
    began = time.process_time()
    for _ in range(20):
        share(text, "en")
    assert (time.process_time() - began) / 20 < 0.01


@given(st.lists(st.sampled_from(PIECES), max_size=30), st.sampled_from(sorted(SCRIPTS)))
def test_the_share_is_a_share(pieces: list[str], target: str) -> None:
    assert 0.0 <= share("".join(pieces), target) <= 1.0
