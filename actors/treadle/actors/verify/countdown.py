"""`countdown`: an expression over given numbers that reaches a target.

The answer is parsed to a syntax tree and evaluated node by node with exact fractions; nothing is executed.
Powers, names, calls and attributes are not in the list of nodes, so `99**98**97` is refused, not computed.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

from treadle.actors.verify.answer import answer_region, boxless
from treadle.actors.verify.payload import choice, integer, integers

if TYPE_CHECKING:
    from treadle.platform.records import Json

MAX_BITS = 4096
"""Largest numerator or denominator of an intermediate result."""
MAX_LENGTH = 1000
"""Longest expression in characters; bounds the depth of its tree."""
_CHARACTERS = re.compile(r"[0-9+\-*/() ]+")
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "\n": " ", "\t": " "})


class Unusable(Exception):  # noqa: N818  an answer of the policy, not a fault
    """An answer that is not an expression of the allowed kind."""


class CountdownVerifier:
    """Payload: `numbers` (integers, none negative), `target` (integer), optional `use`: `all` (each number
    exactly once, the default) or `at_most` (each at most once). `expression = target` is accepted as well.

    Example: payload `{"numbers": [3, 4, 5], "target": 35}`, answer `(3 + 4) * 5`: accuracy 1.
    """

    name = "countdown"
    version = "1"
    deterministic = True

    def score(self, completion: str, payload: Mapping[str, Json]) -> tuple[tuple[str, float], ...]:
        numbers = integers(payload, "numbers")
        target = integer(payload, "target")
        use = choice(payload, "use", ("all", "at_most"))
        try:
            expression = _left_of_equals(boxless(answer_region(completion)), target)
            value, used = evaluate(expression, max_length=min(MAX_LENGTH, 64 + 24 * len(numbers)))
        except Unusable:
            return (("accuracy", 0.0),)
        right = value == target and _uses(used, Counter(numbers), use)
        return (("accuracy", float(right)),)


def evaluate(expression: str, max_length: int) -> tuple[Fraction, Counter[int]]:
    """The value and the integers used, each as often as it occurs.

    Raises `Unusable` for text over `max_length` characters, anything but integers, `+ - * /` and
    parentheses, a division by zero, or an intermediate result over `MAX_BITS`.
    """
    text = expression.translate(_SIGNS).strip()
    if len(text) > max_length or not _CHARACTERS.fullmatch(text):
        raise Unusable
    used: Counter[int] = Counter()
    try:
        return _value(ast.parse(text, mode="eval").body, used), used
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unusable from error


def _value(node: ast.expr, used: Counter[int]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            used[number] += 1
            return _capped(Fraction(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, used)
        case ast.BinOp(left=left, op=op, right=right):
            return _capped(_combined(op, _value(left, used), _value(right, used)))
        case _:
            raise Unusable


def _combined(op: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    match op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div() if right:
            return left / right
        case _:
            raise Unusable


def _capped(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise Unusable
    return value


def _left_of_equals(answer: str, target: int) -> str:
    expression, equals, right = answer.partition("=")
    if equals and right.strip() != str(target):
        raise Unusable
    return expression


def _uses(used: Counter[int], given: Counter[int], use: str) -> bool:
    return used == given if use == "all" else used <= given
