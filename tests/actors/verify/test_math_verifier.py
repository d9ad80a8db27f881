"""Symbolic equality, in this process; what hangs is tested in the pool."""

import threading

import pytest

from treadle.actors.verify.symbolic import MathVerifier
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
        ("50\\%", "50"),
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


def test_computations_are_accepted_when_the_payload_allows_them(verifier: MathVerifier) -> None:
    assert accuracy(verifier, "2", "1+1", allow_unevaluated=True) == 1.0
    assert accuracy(verifier, "1+\\sqrt{2}", "\\sqrt{2}+1") == 1.0


def test_the_version_names_the_parsers(verifier: MathVerifier) -> None:
    assert "math-verify 0.9.0" in verifier.version
    assert "antlr4-python3-runtime 4.13" in verifier.version


def test_an_unreadable_expected_answer_is_a_failure(verifier: MathVerifier) -> None:
    with pytest.raises(DataError):
        accuracy(verifier, " ", "5")


def test_it_needs_no_signals_and_so_works_off_the_main_thread(verifier: MathVerifier) -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(accuracy(verifier, "2\\sqrt{3}", "\\sqrt{12}")))
    thread.start()
    thread.join(30)
    assert found == [1.0]
