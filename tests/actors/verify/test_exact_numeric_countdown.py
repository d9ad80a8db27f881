"""The verifiers that need no parser of mathematics."""

import time
from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.actors.verify import rational
from treadle.actors.verify.countdown import CountdownVerifier, Unusable, evaluate
from treadle.actors.verify.exact import ExactVerifier
from treadle.actors.verify.numeric import NumericVerifier
from treadle.platform.errors import DataError
from treadle.platform.records import Json


def accuracy(
    verifier: ExactVerifier | NumericVerifier | CountdownVerifier, given_: str, **payload: Json
) -> float:
    ((name, value),) = verifier.score(f"<think>because</think><answer>{given_}</answer>", payload)
    assert name == "accuracy"
    return value


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("132", "132", 1.0),
        (" 132\n", "132", 1.0),
        ("\\boxed{132}", "132", 1.0),
        ("１３２", "132", 1.0),
        ("0132", "132", 0.0),
        ("132 133", "132", 0.0),
        ("13\u200b2", "132", 0.0),
        ("\u202e132", "132", 0.0),
        ("132\x00", "132", 0.0),
        ("", "132", 0.0),
        ("PARIS", "Paris", 0.0),
    ],
)
def test_exact_compares_strings(answer: str, gold: str, expected: float) -> None:
    assert accuracy(ExactVerifier(), answer, answer=gold) == expected


def test_exact_can_ignore_case_and_takes_numbers_from_the_payload() -> None:
    assert accuracy(ExactVerifier(), "PARIS", answer="Paris", ignore_case=True) == 1.0
    assert accuracy(ExactVerifier(), "7", answer=7) == 1.0


@pytest.mark.parametrize(
    "payload", [{}, {"answer": ""}, {"answer": None}, {"answer": ["1"]}, {"answer": True}]
)
@pytest.mark.parametrize("verifier", [ExactVerifier(), NumericVerifier()], ids=["exact", "numeric"])
def test_a_payload_without_an_answer_is_a_failure_and_no_zero(
    payload: Mapping[str, Json], verifier: ExactVerifier | NumericVerifier
) -> None:
    with pytest.raises(DataError, match="answer"):
        verifier.score("1", payload)


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("1/2", "0.5", 1.0),
        ("50%", "0.5", 1.0),
        ("50\\%", "0.5", 1.0),
        ("5e-1", "0.5", 1.0),
        ("0.50", "0.5", 1.0),
        ("\\frac{1}{2}", "0.5", 1.0),
        ("-\\dfrac{1}{2}", "-0.5", 1.0),
        ("0.500001", "0.5", 0.0),
        ("50", "50%", 0.0),
        ("1e3", "1000", 1.0),
        ("10^3", "1e3", 1.0),
        ("-10^{3}", "-1000", 1.0),
        ("3 \\times 10^{5}", "300000", 1.0),
        ("1,234,567.0", "1234567", 1.0),
        ("1,2,3", "123", 0.0),
        ("5 6", "56", 0.0),
        ("- 5", "-5", 1.0),
        ("−5", "-5", 1.0),
        ("+5", "5", 1.0),
        ("-0", "0", 1.0),
        ("$5$", "5", 1.0),
        ("$5.", "5", 1.0),
        (".5", "1/2", 1.0),
        ("5.", "5", 1.0),
        (".", "0", 0.0),
        ("1/0", "0", 0.0),
        ("1/3", "0.333333", 0.0),
        ("2/6", "1/3", 1.0),
        ("6/2/1", "3", 0.0),
        ("10²", "102", 0.0),
        ("٥", "5", 0.0),
        ("1e999999999", "1e999999999", 1.0),
        ("1e999999999", "1e999999998", 0.0),
        ("1e9999999999", "1", 0.0),
        ("inf", "1", 0.0),
        ("nan", "1", 0.0),
        ("0x10", "16", 0.0),
        ("1_000", "1000", 0.0),
        ("1+1", "2", 0.0),
    ],
)
def test_numeric_compares_values(answer: str, gold: str, expected: float) -> None:
    assert accuracy(NumericVerifier(), answer, answer=gold) == expected


def test_numeric_takes_percent_as_a_unit_when_told() -> None:
    assert accuracy(NumericVerifier(), "50%", answer="50", percent="ignore") == 1.0
    with pytest.raises(DataError, match="percent"):
        accuracy(NumericVerifier(), "50%", answer="50", percent="maybe")


def test_numeric_tolerances_are_exact_at_their_border() -> None:
    verifier = NumericVerifier()
    assert accuracy(verifier, "1.3", answer="1", abs_tol=0.3) == 1.0
    assert accuracy(verifier, "1.3000000000000000001", answer="1", abs_tol=0.3) == 0.0
    assert accuracy(verifier, "101", answer="100", rel_tol=0.01) == 1.0
    assert accuracy(verifier, "101.01", answer="100", rel_tol=0.01) == 0.0
    with pytest.raises(DataError, match="abs_tol"):
        accuracy(verifier, "1", answer="1", abs_tol=-1.0)


def test_numeric_refuses_a_gold_answer_that_is_no_number() -> None:
    with pytest.raises(DataError, match="not a number"):
        accuracy(NumericVerifier(), "1", answer="x+1")


def test_integers_of_twenty_thousand_digits_compare_by_their_digits() -> None:
    number = "7" * 20_000
    began = time.process_time()
    assert accuracy(NumericVerifier(), number, answer=number) == 1.0
    assert accuracy(NumericVerifier(), number[:-1] + "8", answer=number) == 0.0
    assert accuracy(NumericVerifier(), f"{number}/3", answer=number) == 0.0
    assert time.process_time() - began < 1.0


@given(st.fractions(), st.fractions())
def test_numeric_agrees_with_fractions(a: Fraction, b: Fraction) -> None:
    left, right = rational.read(str(a)), rational.read(str(b))
    assert left is not None
    assert right is not None
    assert left.fraction() == a
    assert rational.same(left, right) == (a == b)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6))
def test_numeric_reads_every_decimal_as_its_value(value: object) -> None:
    number = rational.read(str(value))
    assert number is not None
    assert number.fraction() == Fraction(str(value))


@given(st.text(max_size=60))
def test_numeric_reads_any_text_without_raising(text: str) -> None:
    number = rational.read(text)
    assert number is None or number.sign in (-1, 0, 1)


@pytest.mark.parametrize(
    ("answer", "use", "expected"),
    [
        ("(3 + 4) * 5", "all", 1.0),
        ("(3 + 4) × 5", "all", 1.0),
        ("(3+4)*5 = 35", "all", 1.0),
        ("\\boxed{(3+4)*5}", "all", 1.0),
        ("(3+4)*5 = 36", "all", 0.0),
        ("5*7", "all", 0.0),
        ("35", "all", 0.0),
        ("(3+4)*5*1", "all", 0.0),
        ("(3+4)*5+3-3", "all", 0.0),
        ("-3+4+34", "all", 0.0),
        ("3+4*5", "all", 0.0),
        ("5*(3+4)/1", "at_most", 0.0),
        ("", "all", 0.0),
        ("(3+4)*", "all", 0.0),
        ("((((3+4)*5", "all", 0.0),
        ("3 4 5", "all", 0.0),
        ("03+4*5", "all", 0.0),
    ],
)
def test_countdown_wants_each_number_once(answer: str, use: str, expected: float) -> None:
    assert accuracy(CountdownVerifier(), answer, numbers=[3, 4, 5], target=35, use=use) == expected


def test_countdown_can_leave_numbers_out() -> None:
    verifier = CountdownVerifier()
    assert accuracy(verifier, "5*7", numbers=[3, 5, 7], target=35, use="at_most") == 1.0
    assert accuracy(verifier, "5*7", numbers=[3, 5, 7], target=35) == 0.0
    assert accuracy(verifier, "5*7+5-5", numbers=[3, 5, 7], target=35, use="at_most") == 0.0
    assert accuracy(verifier, "-3+38", numbers=[3, 38], target=35) == 1.0


def test_countdown_divides_exactly() -> None:
    verifier = CountdownVerifier()
    assert accuracy(verifier, "8/(3-8/3)", numbers=[8, 3, 8, 3], target=24) == 1.0
    assert accuracy(verifier, "1/3*3", numbers=[1, 3, 3], target=1) == 1.0
    assert accuracy(verifier, "1/(3-3)", numbers=[1, 3, 3], target=1) == 0.0


@pytest.mark.parametrize(
    "hostile",
    [
        "99**98**97",
        "9//2",
        "9%2",
        "9<<9",
        "9e9",
        "__import__('os').system('true')",
        "().__class__",
        "lambda: 3",
        "[3,4]",
        "3 if 4 else 5",
        "3,4",
        "True",
        "3j",
        "(" * 500 + "3" + ")" * 500,
        "-" * 900 + "3",
        "9" * 100_000,
        "*".join(["9" * 90] * 10),
        "3\x00+4",
        "3+４",
        "3" + "+3" * 100_000,
    ],
)
def test_countdown_computes_nothing_but_small_sums(hostile: str) -> None:
    began = time.process_time()
    assert accuracy(CountdownVerifier(), hostile, numbers=[3, 4, 5], target=35) == 0.0
    assert time.process_time() - began < 0.5


def test_countdown_caps_intermediate_results() -> None:
    with pytest.raises(Unusable):
        evaluate("*".join(["9" * 200] * 8), max_length=2000)


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"numbers": [], "target": 1},
        {"numbers": [1, "2"], "target": 1},
        {"numbers": [1], "target": "1"},
        {"numbers": [1]},
        {"numbers": [-1], "target": 1},
        {"numbers": [True], "target": 1},
        {"numbers": [1], "target": 1, "use": "some"},
    ],
)
def test_countdown_refuses_a_broken_payload(payload: Mapping[str, Json]) -> None:
    with pytest.raises(DataError):
        CountdownVerifier().score("1", payload)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.data())
def test_countdown_agrees_with_an_expression_built_from_fractions(
    numbers: list[int], data: st.DataObject
) -> None:
    text, value = str(numbers[0]), Fraction(numbers[0])
    for number in numbers[1:]:
        sign = data.draw(st.sampled_from("+-*/"))
        value = {"+": value + number, "-": value - number, "*": value * number, "/": value / number}[sign]
        text = f"({text}){sign}{number}"
    found, used = evaluate(text, max_length=1000)
    assert found == value
    assert sorted(used.elements()) == sorted(numbers)
