"""`math`: symbolic equality by math-verify, behind cheaper and stricter checks.

math-verify may compute for hours on a short text, and its parsed expressions may never finish printing. So it
runs only inside a process that can be killed, without timeouts of its own (they are signals that turn a hang
into a silent "wrong"), and no parsed expression is printed, logged, pickled or returned.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version as distribution_version
from typing import TYPE_CHECKING

import math_verify

from treadle.actors.verify import rational
from treadle.actors.verify.answer import answer_region, boxless, plain
from treadle.actors.verify.payload import text_field
from treadle.platform.errors import DataError

if TYPE_CHECKING:
    from treadle.platform.records import Json

MAX_CHARACTERS = 2000
"""What the parser sees of a longer answer is its tail."""
_PARSERS = ("math-verify", "latex2sympy2_extended", "antlr4-python3-runtime", "sympy")
_ENVIRONMENT = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_UNEVALUATED = re.compile(
    r"[0-9)}\]]\s*[!+*×·-]"
    r"|[0-9)]\s*(?:\^(?!\s*\{?\s*\\circ)|\*\*)"
    r"|\\(?:sum|prod|i*int|lim|[dt]?binom|times|cdot|sqrt|log|ln|exp|sin|cos|tan|gcd|lcm|max|min)(?![a-z])"
)
"""An operation left to the grader. Where a number is expected, `1+1` for 2 or `\\sum_{k=1}^{100} k` for 5050
repeats the question, and a policy learns to."""


class GradingError(Exception):
    """math-verify broke. Names the type of its error only: the message may hold an expression whose text
    never ends."""


class MathVerifier:
    """Payload: `answer` (LaTeX or plain); optional `allow_unevaluated` (accept `1+1` where 2 is expected).

    The answer is the region's box, its only `$…$`, or all of it; prose must box its answer. Percent signs
    count as either unit or division, as in math-verify. `version` names the parsers: grades change with them.
    Building one imports sympy and runs every stage once, so that no completion pays for it.
    """

    name = "math"

    def __init__(self) -> None:
        for module in ("math_verify", "latex2sympy2_extended"):
            logging.getLogger(module).setLevel(logging.CRITICAL)
        installed = ", ".join(f"{package} {distribution_version(package)}" for package in _PARSERS)
        self.version = f"1 ({installed})"
        for gold, answer in (("\\frac{x}{2}", "\\frac{2x}{4}"), ("(1,2)", "[1,3)"), ("x=\\sqrt{2}", "1.41")):
            _equal(gold, answer)

    def score(self, completion: str, payload: Mapping[str, Json]) -> tuple[tuple[str, float], ...]:
        gold = text_field(payload, "answer")
        answer = _only_environment(boxless(answer_region(completion)))
        right = _cheap(gold, answer)
        if right is None and not payload.get("allow_unevaluated", False) and _left_to_grader(gold, answer):
            right = False
        if right is None:
            right = _equal(gold, answer[-MAX_CHARACTERS:])
        return (("accuracy", float(right)),)


def _only_environment(answer: str) -> str:
    """What stands between the dollars; empty where several formulas are offered for choice."""
    if "$" not in answer and "\\(" not in answer and "\\[" not in answer:
        return answer
    found = _ENVIRONMENT.findall(answer[-MAX_CHARACTERS:])
    return "".join(found[0]).strip() if len(found) == 1 else ""


def _cheap(gold: str, answer: str) -> bool | None:
    """Equality that needs no parser, or None where one is needed. A decimal that is not equal may still be
    a rounding, which the parser accepts to six places."""
    if not answer:
        return False
    if plain(answer) == plain(gold):
        return True
    expected, found = rational.read(gold), rational.read(answer)
    if expected is None or found is None:
        return None
    units = rational.read(gold, "ignore"), rational.read(answer, "ignore")
    if rational.same(expected, found) or (units[0] == units[1] and "%" in gold + answer):
        return True
    expandable = expected.fraction() is not None and found.fraction() is not None
    return None if expandable and ("." in answer or "." in gold) else False


def _left_to_grader(gold: str, answer: str) -> bool:
    """Whether a number is expected and the answer, after its last equals sign, is a computation."""
    return rational.read(gold) is not None and _UNEVALUATED.search(_after_equals(answer)) is not None


def _after_equals(answer: str) -> str:
    """What follows the last `=` outside braces: `2+3=5` commits to 5, the `k=1` below a sum to nothing."""
    depth = 0
    for position in range(len(answer) - 1, -1, -1):
        char = answer[position]
        depth += (char == "}") - (char == "{")
        if char == "=" and depth == 0:
            return answer[position + 1 :]
    return answer


def _equal(gold: str, answer: str) -> bool:
    parsed = _parsed_gold(gold)
    if not parsed:
        raise DataError(f"math-verify cannot read the expected answer {gold[:80]!r}.", "Write it as LaTeX.")
    try:
        return bool(math_verify.verify(parsed, _parsed(answer), timeout_seconds=None, raise_on_error=True))
    except Exception as error:  # noqa: BLE001  whatever breaks in the parser or sympy is a failed verdict
        raise GradingError(f"math-verify raised {type(error).__name__}") from None


@lru_cache(maxsize=256)
def _parsed_gold(gold: str) -> list[object]:
    return _parsed(_only_environment(boxless(gold)))


def _parsed(text: str) -> list[object]:
    return math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)
