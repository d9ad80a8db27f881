"""Values that cross between a judge and a program: JSON, and what Python has beyond it under `$` keys.

    {"$tuple": […]}   {"$set": […]}   {"$dict": [[key, value], …]} (keys that are not text)
    {"$int": "12"}    an integer JSON's readers may round
    {"$float": "nan"} and {"$other": "type name"}: equal to nothing

Compared here, on the judge's side, node by node: what a program returns has no methods any more.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treadle.platform.errors import DataError

if TYPE_CHECKING:
    from treadle.platform.records import Json


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far numbers may be apart: the larger of `absolute` and `relative` times the larger magnitude. Zero
    means equal. Integers that JSON can hold are compared exactly all the same where both are zero."""

    absolute: float = 0.0
    relative: float = 0.0

    def close(self, expected: float, found: float) -> bool:
        if not (math.isfinite(expected) and math.isfinite(found)):
            return False
        return math.isclose(expected, found, rel_tol=self.relative, abs_tol=self.absolute)


EXACT = Tolerance()


def encode(value: object) -> Json:
    """A Python literal as it crosses. Raises `DataError` for other types."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"$tuple": [encode(item) for item in value]}
    if isinstance(value, set | frozenset):
        return {"$set": [encode(item) for item in value]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: encode(item) for key, item in value.items()}
        return {"$dict": [[encode(key), encode(item)] for key, item in value.items()]}
    raise DataError(
        f"A test holds a {type(value).__name__}, which cannot be handed to a program.", "Use JSON."
    )


def same(expected: Json, found: Json, tolerance: Tolerance = EXACT, strict: bool = False) -> bool:
    """Whether a program returned what was expected.

    True is not 1; 1 and 1.0 are equal, because JSON and JavaScript do not tell them apart. A tuple counts as
    a list unless `strict` (then only a tuple equals a tuple). Order matters, except in sets and objects.
    Infinities and NaN equal nothing.

    Example: `same([1, 2], {"$tuple": [1, 2.0]})` holds, with `strict=True` it does not.
    """
    try:
        return _same(expected, found, tolerance, strict)
    except RecursionError:
        return False


def truth(found: Json) -> bool | None:
    """Whether Python would take a returned value for true; None where that cannot be known."""
    if isinstance(found, dict) and len(found) == 1:
        ((tag, content),) = found.items()
        if tag == "$other":
            return None
        if tag in ("$tuple", "$set", "$dict"):
            return bool(content)
    return bool(found)


def _same(expected: Json, found: Json, tolerance: Tolerance, strict: bool) -> bool:
    expected, found = _plain(expected, strict), _plain(found, strict)
    if isinstance(expected, bool) or isinstance(found, bool) or expected is None or found is None:
        return expected is found
    if isinstance(expected, int | float) and isinstance(found, int | float):
        return _numbers(expected, found, tolerance)
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(
            _same(one, other, tolerance, strict) for one, other in zip(expected, found, strict=True)
        )
    if isinstance(expected, dict) and isinstance(found, dict):
        return expected.keys() == found.keys() and all(
            _tagged(key, expected[key], found[key], tolerance, strict) for key in expected
        )
    return isinstance(expected, str) and isinstance(found, str) and expected == found


def _numbers(expected: float, found: float, tolerance: Tolerance) -> bool:
    if tolerance == EXACT:
        return expected == found and _finite(expected)
    try:
        return tolerance.close(float(expected), float(found))
    except OverflowError:
        return expected == found


def _finite(number: float) -> bool:
    return isinstance(number, int) or math.isfinite(number)


def _tagged(key: str, expected: Json, found: Json, tolerance: Tolerance, strict: bool) -> bool:
    if key in ("$float", "$other"):
        return False
    if key in ("$set", "$dict") and isinstance(expected, list) and isinstance(found, list):
        expected, found = sorted(expected, key=_text), sorted(found, key=_text)
    return _same(expected, found, tolerance, strict)


def _text(value: Json) -> str:
    return json.dumps(value, sort_keys=True)


def _plain(value: Json, strict: bool) -> Json:
    if not isinstance(value, dict) or len(value) != 1:
        return value
    if "$int" in value:
        digits = value["$int"]
        return int(digits) if isinstance(digits, str) and digits.lstrip("-").isdecimal() else value
    if not strict and isinstance(value.get("$tuple"), list):
        return value["$tuple"]
    return value
