"""What `math` refuses although math-verify accepts it, and the option that allows it."""

import math_verify
import pytest

from treadle.actors.verify.strictness import MathRules, chains, values
from treadle.actors.verify.symbolic import MathVerifier
from treadle.platform.errors import ConfigError, DataError
from treadle.platform.records import Json

REFUSED: list[tuple[str, str, str, Json]] = [
    ("40320", "8!", "allow_unevaluated", True),
    ("5050", "\\sum_{k=1}^{100} k", "allow_unevaluated", True),
    ("2", "1+1", "allow_unevaluated", True),
    ("(2,2)", "(1+1,2)", "allow_unevaluated", True),
    ("(-\\infty,3)", "(-\\infty,2+1)", "allow_unevaluated", True),
    ("4", "\\sqrt{16}", "allow_unevaluated", True),
    ("2", "\\frac{4}{2}", "allow_unevaluated", True),
    ("1", "\\frac33", "allow_unevaluated", True),
    ("1024", "2^{10}", "allow_unevaluated", True),
    ("3", "|-3|", "allow_unevaluated", True),
    ("6", "\\binom{4}{2}", "allow_unevaluated", True),
    ("\\frac{n(n+1)}{2}", "\\binom{n+1}{2} + \\sum_{k=1}^{0} k", "allow_unevaluated", True),
    ("3", "1=2=3", "allow_chains", True),
    ("11", "x = 5+5+1 = 7 = 11", "allow_chains", True),
    ("4", "3=4", "allow_chains", True),
    ("3", "3 \\approx 4", "allow_chains", True),
    ("1/3", "x = 1/3 \\approx 1.3", "allow_chains", True),
    ("(1,2)", "\\{1,2\\}", "allow_set_for_tuple", True),
    ("(100,200)", "\\{100, 200\\}", "allow_set_for_tuple", True),
    ("101_2", "101", "allow_missing_base", True),
    ("101", "101_2", "allow_missing_base", True),
    ("50\\%", "50", "percent", "ignore"),
    ("50", "50\\%", "percent", "ignore"),
    ("50\\%", "50", "percent", "either"),
    ("0.123", "0.1234", "decimals", 3),
    ("\\frac{1}{3}", "0.33", "decimals", 2),
]
OPTIONS = [f"{gold}|{answer}|{option}" for gold, answer, option, _ in REFUSED]


@pytest.fixture(scope="module")
def verifier() -> MathVerifier:
    return MathVerifier()


def accuracy(verifier: MathVerifier, gold: str, answer: str, **rules: Json) -> float:
    ((_, value),) = verifier.score(f"<think>t</think><answer>{answer}</answer>", {"answer": gold, **rules})
    return value


@pytest.mark.parametrize(("gold", "answer", "option", "allowed"), REFUSED, ids=OPTIONS)
def test_it_is_refused_unless_the_payload_allows_it(
    verifier: MathVerifier, gold: str, answer: str, option: str, allowed: Json
) -> None:
    assert accuracy(verifier, gold, answer) == 0.0
    assert accuracy(verifier, gold, answer, **{option: allowed}) == 1.0


def test_the_run_can_allow_it_and_the_prompt_can_refuse_it_again() -> None:
    lenient = MathVerifier(allow_unevaluated=True, percent="either")
    assert accuracy(lenient, "40320", "8!") == 1.0
    assert accuracy(lenient, "40320", "8!", allow_unevaluated=False) == 0.0
    assert [accuracy(lenient, "50%", answer) for answer in ("50", "0.5", "50%", "5")] == [1.0, 1.0, 1.0, 0.0]


def test_one_percent_reading_holds_and_not_both(verifier: MathVerifier) -> None:
    answers = ("50\\%", "50 percent", "0.5", "1/2", "50")
    assert [accuracy(verifier, "50\\%", a) for a in answers] == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert [accuracy(verifier, "50\\%", a, percent="ignore") for a in answers] == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert accuracy(verifier, "\\{\\frac{1}{2}, 3\\}", "\\{50\\%, 3\\}") == 1.0
    assert accuracy(verifier, "\\{50, 3\\}", "\\{50\\%, 3\\}") == 0.0


JOINERS = [
    " or ",
    ", ",
    "; ",
    " and ",
    " \\text{ or } ",
    " \\to ",
    " \\Rightarrow ",
    " \\neq ",
    " | ",
    "\\cup ",
    "/",
    ":",
]
JOINERS += [
    "\\quad ",
    " & ",
    "\\sim ",
    " \\in ",
    "\n",
    " \\pm ",
    "\\lor ",
    "->",
    "\\; ",
    " vs ",
    "\\\\",
    "\\oplus ",
    "~",
]


@pytest.mark.parametrize("joiner", JOINERS)
@pytest.mark.parametrize("form", ["3{}4", "x=3{}x=4", "\\boxed{{3{}4}}", "4{}3"])
def test_two_values_earn_nothing_where_one_is_expected(
    verifier: MathVerifier, joiner: str, form: str
) -> None:
    answer = form.format(joiner)
    assert [accuracy(verifier, gold, answer) for gold in ("3", "4", "x=3", "x=4")] == [0.0] * 4


def test_alternatives_are_left_to_the_parser_when_allowed(verifier: MathVerifier) -> None:
    """math-verify takes the end of `3 → 4` for its value."""
    answer = "3 \\text{ then } \\rightarrow x=4"
    assert accuracy(verifier, "x=4", answer) == 0.0
    assert accuracy(verifier, "3,4", "3 or 4") == 1.0
    assert accuracy(verifier, "\\pm 3", "3, -3") == 1.0
    assert accuracy(verifier, "\\pm 3", "\\pm 3") == 1.0


def test_of_boxes_that_contradict_each_other_the_last_counts_or_none(verifier: MathVerifier) -> None:
    text = "First \\boxed{3}, no: \\boxed{4}."
    assert [verifier.score(text, {"answer": gold})[0][1] for gold in ("3", "4")] == [0.0, 1.0]
    strict: list[Json] = ["3", "4"]
    assert [verifier.score(text, {"answer": g, "last_box_counts": False})[0][1] for g in strict] == [0.0, 0.0]
    again = "So \\boxed{4}. Indeed: \\boxed{4}"
    assert verifier.score(again, {"answer": "4", "last_box_counts": False})[0][1] == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("40320", "8!"),
        ("5050", "\\sum_{k=1}^{100} k"),
        ("2", "1+1"),
        ("3", "1=2=3"),
        ("4", "3=4"),
        ("(1,2)", "\\{1,2\\}"),
        ("50\\%", "50"),
        ("50\\%", "0.5"),
        ("101_2", "101"),
    ],
)
def test_math_verify_itself_accepts_what_is_refused_here(gold: str, answer: str) -> None:
    """Should a later version refuse them, the rule can go."""
    parsed = [math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
    assert math_verify.verify(*parsed, timeout_seconds=None)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("x^2/4+y^2/3=1", "x^2/16+y^2/12=1/4"),
        ("2x+4y-3=0", "y=-\\frac{1}{2}x+\\frac{3}{4}"),
        ("\\frac{n(n-1)}{2}", "\\binom{n}{2}"),
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("1+\\sqrt{2}", "\\sqrt{2}+1"),
        ("2^{100}", "2^{100}"),
        ("n!", "n \\cdot (n-1)!"),
        ("3+4i", "4i+3"),
        ("25\\pi", "S=\\pi r^2=25\\pi"),
        ("(1,3)", "{1,3}"),
        ("\\{1,2\\}", "x=1 or x=2"),
        ("-\\frac{1}{2}", "\\frac{-1}{2}"),
        ("1/3", "2/6"),
        ("0.75", "\\frac{3}{4}"),
        ("90^\\circ", "90"),
        ("2.5", "2\\frac{1}{2}"),
        ("\\text{Monday}", "Monday"),
    ],
)
def test_strictness_costs_no_honest_answer(verifier: MathVerifier, gold: str, answer: str) -> None:
    assert accuracy(verifier, gold, answer) == 1.0


@pytest.mark.parametrize(
    ("option", "value"),
    [("allow_chains", 1), ("allow_chains", "yes"), ("percent", 1), ("decimals", "6"), ("decimals", True)],
)
def test_a_payload_option_of_another_type_is_a_failure(
    verifier: MathVerifier, option: str, value: Json
) -> None:
    with pytest.raises(DataError, match=option):
        accuracy(verifier, "3", "3", **{option: value})


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"verify\.options\.math\.percent='both'"):
        MathVerifier(percent="both")
    with pytest.raises(ConfigError, match="decimals=99"):
        MathVerifier(decimals=99)
    with pytest.raises(DataError, match="percent='both'"):
        MathRules().for_prompt({"percent": "both"})


def test_chains_are_read_in_pairs_with_the_decimals_they_promise() -> None:
    assert chains("x = 17/3 = 5.67 \\approx 6") == [("17/3", "5.67", 2), ("5.67", "6", 0)]
    assert chains("1,234 = 1234") == [("1234", "1234", None)]
    assert chains("A = 2\\pi r = 6") == []
    assert values("2x+y=0, z=3") == ["2x+y=0", "3"]
