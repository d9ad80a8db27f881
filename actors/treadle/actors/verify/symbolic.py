r"""`math`: symbolic equality by math-verify, behind cheaper and stricter checks.

math-verify may compute for hours on a short text, and its parsed expressions may never finish printing. So it
runs only inside a process that can be killed, without timeouts of its own (they are signals that turn a hang
into a silent "wrong"), and no parsed expression is printed, logged, pickled or returned.

Where it departs from math-verify: the answer's region is found first (`commitment`), numbers are compared exactly
and without it (`rational`), and answers that restate the question or commit to nothing are refused (`strictness`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version as distribution_version
from typing import TYPE_CHECKING

import math_verify

from treadle.actors.verify import rational, strictness
from treadle.actors.verify.answer import as_latex, plain, readable
from treadle.actors.verify.commitment import committed_answer, expected_answer
from treadle.actors.verify.payload import text_field
from treadle.actors.verify.strictness import PERCENT, MathRules
from treadle.platform.errors import DataError

if TYPE_CHECKING:
    from treadle.platform.records import Json

MAX_CHARACTERS = 2000
ROOM_CHARACTERS, ROOM_FACTOR = 300, 10
"""Longest answer that is parsed: 300 characters and ten times the expected answer, at most 2000 in all. A longer one is
right only where it is the expected text or number. Parsing time explodes with length, and nobody needs a page to say
what fits into a line."""
_PARSERS = ("math-verify", "latex2sympy2_extended", "antlr4-python3-runtime", "sympy")
_LATEX = (math_verify.LatexExtractionConfig(boxed_match_priority=0),)
_SELF_TEST = (
    ("\\frac{x}{2}", "\\frac{2x}{4}", True),
    ("(1,2)", "[1,3)", False),
    ("x=\\sqrt{2}", "1.41", False),
)


class GradingError(Exception):
    """math-verify broke. Names the type of its error only: the message may hold an expression whose text
    never ends."""


class MathVerifier:
    r"""Payload: `answer` (LaTeX or plain), and any of the options below for this prompt alone.

    The answer is what `commitment.committed_answer` finds: the region's last box, the end of `answer is …`, its only
    formula, or all of it. Full-width digits, those of other scripts and marks that do not show are read as what they
    stand for. Answers much longer than the expected one are not parsed (`MAX_CHARACTERS`), nor deeply nested ones.

    Options, each the strict way by default:

    - `allow_unevaluated`: `8!`, `\sum_{k=1}^{3} k`, and where numbers are expected `1+1` or `\sqrt{16}`, are computed.
    - `allow_chains`: the links of `1 = 2 = 3` may disagree; the last one counts.
    - `allow_alternatives`: one value is expected and `3 or 4`, `\pm 3` or `3 \to 4` is left to the parser.
    - `allow_set_for_tuple`: `\{1,2\}` may stand for `(1,2)`, and the other way.
    - `allow_missing_base`: `101` may stand for `101_2`.
    - `last_box_counts`: of boxes that contradict each other the last one counts (the default); else none does.
    - `percent`: `divide` reads `50\%` as 1/2 (the default), `ignore` as 50, `either` accepts both.
    - `decimals`: places to which a decimal must agree. A small number must agree to three digits
      as well (`rational.rounds_to`).

    Units are dropped and not compared, as in math-verify. `version` names the parsers and the options that differ from
    these: grades change with both. Building one imports sympy and runs every stage once, so that no completion pays for
    it. Raises `GradingError` where math-verify is broken: that is a failed verdict, not a wrong answer.

    Example: `MathVerifier(percent="ignore").score("<think>…</think>$2\\sqrt{3}$", {"answer": "\\sqrt{12}"})` is
    `(("accuracy", 1.0),)`.
    """

    name = "math"
    deterministic = True

    def __init__(
        self,
        *,
        allow_unevaluated: bool = False,
        allow_chains: bool = False,
        allow_alternatives: bool = False,
        allow_set_for_tuple: bool = False,
        allow_missing_base: bool = False,
        last_box_counts: bool = True,
        percent: str = PERCENT[0],
        decimals: int = 6,
    ) -> None:
        self._rules = MathRules(
            allow_unevaluated=allow_unevaluated,
            allow_chains=allow_chains,
            allow_alternatives=allow_alternatives,
            allow_set_for_tuple=allow_set_for_tuple,
            allow_missing_base=allow_missing_base,
            last_box_counts=last_box_counts,
            percent=percent,
            decimals=decimals,
        )
        self._rules.check("verify.options.math.")
        for module in ("math_verify", "latex2sympy2_extended"):
            logging.getLogger(module).setLevel(logging.CRITICAL)
        installed = [f"{package} {distribution_version(package)}" for package in _PARSERS]
        self.version = f"2 ({', '.join([*installed, *self._rules.changes()])})"
        if not _works():
            raise GradingError(f"math-verify misjudges simple answers as installed: {self.version}")

    def score(self, completion: str, payload: Mapping[str, Json]) -> tuple[tuple[str, float], ...]:
        rules = self._rules.for_prompt(payload)
        gold = _tidy(expected_answer(text_field(payload, "answer")))
        answer = _tidy(committed_answer(completion, last_box_counts=rules.last_box_counts))
        right = _cheap(gold, answer, rules)
        if right is None:
            right = not strictness.refused(gold, answer, rules) and _parsed_equal(gold, answer, rules)
        return (("accuracy", float(right)),)


def _tidy(text: str) -> str:
    """Without the marks that set an answer off from prose."""
    return as_latex(readable(text)).strip(" *_~").rstrip(" .。*")


def _cheap(gold: str, answer: str, rules: MathRules) -> bool | None:
    """Equality that needs no parser, or None where one is needed."""
    if not answer:
        return False
    if answer == gold or plain(answer) == plain(gold):
        return True
    modes = ("divide", "ignore") if rules.percent == "either" else (rules.percent,)
    verdicts = [_same_number(gold, answer, mode, rules.decimals) for mode in modes]
    if None not in verdicts:
        return any(verdicts) and (rules.allow_unevaluated or not strictness.unreduced(gold, answer))
    if len(answer) > min(MAX_CHARACTERS, ROOM_CHARACTERS + ROOM_FACTOR * len(gold)):
        return False
    return strictness.same_numeral(gold, answer, rules.allow_missing_base)


def _same_number(gold: str, answer: str, percent: str, decimals: int) -> bool | None:
    """Equality of two numbers, to `decimals` places where one of them is a decimal; None for anything else."""
    expected, found = rational.read_measure(gold, percent), rational.read_measure(answer, percent)
    if expected is None or found is None:
        return None
    if rational.same(expected, found):
        return True
    return ("." in answer or "." in gold) and rational.rounds_to(found, expected, decimals)


def _parsed_equal(gold: str, answer: str, rules: MathRules) -> bool:
    gold, answer = (strictness.with_percent(text, rules.percent) for text in (gold, answer))
    if not _equal(gold, answer, rules.decimals):
        return False
    return rules.allow_chains or all(_agree(*link) for link in strictness.chains(answer))


def _agree(left: str, right: str, decimals: int | None) -> bool:
    """Whether two links of a chain are equal, exactly or to so many decimals."""
    first, second = rational.read_measure(left), rational.read_measure(right)
    if first is not None and second is not None:
        return rational.close(first, second, 0.5 * 10.0**-decimals if decimals is not None else None, None)
    if decimals is not None and "." not in right:
        right = f"{right}.0"  # math-verify rounds nothing but decimals
    return _equal(left, right, 6 if decimals is None else decimals)


def _equal(gold: str, answer: str, decimals: int) -> bool:
    """Equality by math-verify. An error of its own means that the two cannot be compared (a division by zero, an
    inequality against an equation), unless it fails on a known pair too."""
    parsed = _parsed_gold(gold)
    if not parsed:
        raise DataError(f"math-verify cannot read the expected answer {gold[:80]!r}.", "Write it as LaTeX.")
    try:
        return _verified(parsed, _parsed(answer), decimals)
    except Exception as error:  # noqa: BLE001  whatever breaks in sympy
        if isinstance(error, MemoryError) or not _works():
            raise GradingError(f"math-verify raised {type(error).__name__}") from None
        return False


def _verified(gold: list[object], answer: list[object], decimals: int) -> bool:
    return bool(
        math_verify.verify(gold, answer, float_rounding=decimals, timeout_seconds=None, raise_on_error=True)
    )


def _works() -> bool:
    """Whether math-verify judges known pairs as it should."""
    try:
        return all(
            _verified(_parsed(gold), _parsed(answer), 6) is equal for gold, answer, equal in _SELF_TEST
        )
    except Exception:  # noqa: BLE001  the answer is no
        return False


@lru_cache(maxsize=256)
def _parsed_gold(gold: str) -> list[object]:
    return _parsed(gold)


def _parsed(text: str) -> list[object]:
    """LaTeX only: math-verify's other reader takes the last number of whatever cannot be parsed."""
    return math_verify.parse(f"\\boxed{{{text}}}", _LATEX, parsing_timeout=None, raise_on_error=True)
