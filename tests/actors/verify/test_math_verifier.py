"""Symbolic equality, in this process; what hangs is tested in the pool."""

import threading
import time

import pytest

from treadle.actors.verify import symbolic
from treadle.actors.verify.symbolic import GradingError, MathVerifier
from treadle.platform.errors import DataError
from treadle.platform.records import Json


@pytest.fixture(scope="module")
def verifier() -> MathVerifier:
    return MathVerifier()


def accuracy(verifier: MathVerifier, gold: str, answer: str, **options: Json) -> float:
    ((_, value),) = verifier.score(f"<think>t</think><answer>{answer}</answer>", {"answer": gold, **options})
    return value


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "42"),
        ("\\frac12", "1/2"),
        ("x=5", "5"),
        ("5", "x=5"),
        ("5", "The answer is \\boxed{5}."),
        ("5", "$5$"),
        ("5", "2+3=5"),
        ("5", "5\\text{ cm}^2"),
        ("90", "90^\\circ"),
        ("50\\%", "50 percent"),
        ("50%", "0.5"),
        ("1e3", "10^3"),
        ("1/3", "0.333333"),
        ("(1,2)", "(1, 2)"),
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("x^2+1", "1+x^2"),
        ("(x+1)^2", "x^2+2x+1"),
        ("\\{1,2\\}", "\\{2,1\\}"),
        ("\\text{Monday}", "Monday"),
        ("-5", "−5"),
        ("9" * 20_000, "9" * 20_000),
        ("132", "１３２"),
        ("132", "١٣٢"),
        ("3.5", "٣٫٥"),
        ("132", "1\u200b3\u200f2"),
        ("2\\sqrt{3}", "\u2066２√3\u2069"),
        ("x^{2}+\\frac{1}{2}", "x²+½"),
        ("\\frac{\\pi}{2}", "π/2"),
        ("x\\le 3", "x ≤ 3"),
        ("10^3", "1e3"),
        ("1250", "\\$1{,}250"),
        ("1000", "1 000"),
        ("11111111100", "11,\\! 111,\\! 111,\\! 100"),
        ("5", "5 km/h"),
        ("5", "5 m^2"),
        ("12", "12cm"),
        ("12\\text{ cm}", "12"),
        ("2x", "x \\cdot 2"),
        ("204_5", "204_{5}"),
        ("x>2", "(2,\\infty)"),
        ("\\{3,-3\\}", "\\pm 3"),
        ("3", "**3**"),
        ("3", "Answer: 3."),
        ("34", "Final Answer: The largest $n$ is 34."),
        ("1,2", "\\boxed{1} and \\boxed{2}"),
        ("17/3", "17/3 \\approx 5.67 \\approx 6"),
        ("5", "x = 2 + 3 = 5"),
        ("1.6\\times 10^{-19}\\text{ C}", "1.6e-19"),
    ],
)
def test_equal_answers_are_accepted(verifier: MathVerifier, gold: str, answer: str) -> None:
    assert accuracy(verifier, gold, answer) == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("3", "1,2,3"),
        ("3", "$1$ $2$ $3$"),
        ("3", "3 or 4"),
        ("3", "\\{1,2,3\\}"),
        ("3", "3=4"),
        ("3", ""),
        ("3", "\\boxed{}"),
        ("3", "\\boxed{3"),
        ("13", "\u202e13"),
        ("4", "3 \\sim 4"),
        ("4", "junk \\notin 4"),
        ("3", "3}{4"),
        ("5", "\\text{The answer is }5"),
        ("1.6\\times 10^{-19}", "9.1\\times 10^{-31}"),
        ("1.6\\times 10^{-19}\\text{ C}", "0"),
        ("0.0000001", "0.0000002"),
        ("x>2", "[2,\\infty)"),
        ("x>2", "x<2"),
        ("101_2", "101_3"),
        ("3", "3\\text{ million}"),
        ("3m", "3"),
        ("3", "3m"),
        ("5A", "5"),
        ("(1,2)", "(2,1)"),
        ("9" * 20_000, "9" * 19_999 + "8"),
        ("9" * 20_000, "x" + "9" * 20_000),
        ("5", "4"),
        ("40320", "8!"),
        ("2", "1+1"),
        ("5050", "\\sum_{k=1}^{100} k"),
        ("4", "\\sqrt{16}"),
        ("120", "2 \\times 60"),
        ("1e5", "1e999999999"),
    ],
)
def test_wrong_or_uncomputed_answers_are_not(verifier: MathVerifier, gold: str, answer: str) -> None:
    assert accuracy(verifier, gold, answer) == 0.0


def test_a_box_in_the_thinking_is_not_an_answer(verifier: MathVerifier) -> None:
    ((_, value),) = verifier.score("<think>\\boxed{5}</think><answer>4</answer>", {"answer": "5"})
    assert value == 0.0


def test_the_version_names_the_parsers_and_the_options_that_differ() -> None:
    version = MathVerifier(percent="ignore", decimals=3).version
    for parser in (
        "math-verify 0.9.0",
        "latex2sympy2_extended 1.11",
        "antlr4-python3-runtime 4.13",
        "sympy 1.",
    ):
        assert parser in version
    assert "percent=ignore, decimals=3" in version
    assert "allow" not in version


def test_an_unreadable_expected_answer_is_a_failure(verifier: MathVerifier) -> None:
    with pytest.raises(DataError):
        accuracy(verifier, " ", "5")
    with pytest.raises(DataError, match="cannot read"):
        accuracy(verifier, "$1$ or rather, as we saw, $2$", "5")


def test_what_cannot_be_compared_is_wrong_and_not_a_failure(verifier: MathVerifier) -> None:
    assert accuracy(verifier, "12:00", "12:00") == 1.0
    assert accuracy(verifier, "12:00", "1:00") == 0.0
    assert accuracy(verifier, "x \\neq 3", "x = 3") == 0.0


def test_a_broken_parser_is_a_failure_and_not_a_wrong_answer(
    verifier: MathVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> bool:
        raise ValueError("signal only works in main thread")

    monkeypatch.setattr(symbolic.math_verify, "verify", broken)
    with pytest.raises(GradingError, match="ValueError"):
        accuracy(verifier, "2\\sqrt{3}", "\\sqrt{12}")
    with pytest.raises(GradingError, match="misjudges"):
        MathVerifier()


def test_it_needs_no_signals_and_so_works_off_the_main_thread(verifier: MathVerifier) -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(accuracy(verifier, "2\\sqrt{3}", "\\sqrt{12}")))
    thread.start()
    thread.join(30)
    assert found == [1.0]


def test_no_parsed_expression_reaches_a_message(verifier: MathVerifier) -> None:
    """The text of this one never ends: printing it was seen to hang for as long as anyone waited."""
    began = time.process_time()
    with pytest.raises(DataError) as caught:
        verifier.score("5", {"answer": "$5^{5^{5^{5^{5}}}}$ but $7$ then"})
    assert "5^" not in str(caught.value)
    assert time.process_time() - began < 1.0
