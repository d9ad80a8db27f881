"""Numbers as text, read exactly and in bounded time.

A decimal is kept as digits and a power of ten, so that `1e999999999` and an integer of 20,000 digits compare
without being expanded (Python refuses to convert integers of more than 4,300 digits from text).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from treadle.actors.verify.answer import plain

MAX_EXPANDED_DIGITS = 4000
"""Longest integer that is built. Larger numbers compare by their digits alone."""
MAX_CHARACTERS = 100_000

_DECIMAL = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)"
    r"(?:\.(?P<tail>[0-9]*))?(?:[eE](?P<exp>[+-]?[0-9]{1,9}))?"
)
_SPACED = ("/", "\\times", "\\cdot", "×", "*", "\\%", "%", "-", "+")
"""Signs that may stand with a space on either side; a space between digits separates two numbers."""
_LATEX_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_POWER_OF_TEN = re.compile(
    r"(?:(?P<factor>.+)(?:\\times|\\cdot|×|\*)|(?P<sign>[+-]?))10\^\{?(?P<exp>[+-]?[0-9]{1,9})\}?"
)

_LAYOUT = re.compile(
    r"\\!\s*|\\[,;: ]|\\(?:left|right|displaystyle)(?![a-zA-Z])|\\\$|(?<=[0-9]) (?=[0-9]{3}\b)"
)
_UNIT_WORD = (
    r"(?:[kcmdµnMG]?m|[kmµ]?g|[kmMG]?(?:W|Wh|Hz|N|J|Pa|V)|ml|mL|L|s|ms|min|h|hr|hrs|mph|kmh|ft|in|lb|lbs|oz|rad|K|A|C|F"
    r"|(?:centi|kilo|milli)?met(?:er|re)s?|(?:kilo|milli)?grams?|lit(?:er|re)s?|seconds?|minutes?|hours?|days?|weeks?"
    r"|months?|years?|inch(?:es)?|feet|foot|yards?|miles?|degrees?|radians?|units?|dollars?|cents?|euros?|people|ways)"
)
_UNIT = re.compile(
    r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|°"
    r"|\\(?:text|textbf|mathrm|mbox)\s*\{(?![^{}]*(?:illion|thousand|hundred|dozen))[^{}0-9%]*\}(?:\s*\^\s*\{?-?[0-9]\}?)?"
    r"|(?:(?<=\s)|(?<=[0-9}])(?=[A-Za-z]{2}))(?:square |cubic |sq\.? |cu\.? )?"
    rf"{_UNIT_WORD}(?:\s?(?:/|per)\s?{_UNIT_WORD})?(?:\^?\{{?[23]\}}?|[²³])?)$"
)


@dataclass(frozen=True, slots=True)
class Rational:
    """`sign · digits · 10^exponent / denominator`; digits without leading or trailing zeros, so that equal
    decimals are equal records. The denominator is 1 for decimals.

    Example: `-1,250.0` is `Rational(-1, "125", 1, 1)`; zero is `Rational(0, "", 0, 1)`.
    """

    sign: int
    digits: str
    exponent: int
    denominator: int = 1

    def fraction(self) -> Fraction | None:
        """The exact value, or None where it has more than `MAX_EXPANDED_DIGITS` digits."""
        if len(self.digits) + abs(self.exponent) > MAX_EXPANDED_DIGITS:
            return None
        value = Fraction(int(self.digits or "0"), self.denominator) * self.sign
        return value * 10**self.exponent if self.exponent >= 0 else value / 10**-self.exponent


def read(text: str, percent: str = "divide") -> Rational | None:
    """The number a text is, or None when it is anything else.

    Accepts integers, decimals, `1e3`, `3 \\times 10^{5}`, grouped thousands, `a/b`, `\\frac{a}{b}`, a leading
    or surrounding `$`, and a trailing percent sign: `divide` reads `50%` as 1/2, `ignore` as 50.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    text = plain(text)
    for sign in _SPACED:
        text = text.replace(f" {sign}", sign).replace(f"{sign} ", sign)
    text = text.strip("$ ").removesuffix(".")
    hundredth = percent == "divide" and text.endswith("%")
    text = text.removesuffix("%").removesuffix("\\")
    number = _fraction(text) or _decimal(_scientific(text))
    if number is None or not hundredth:
        return number
    return _decimal_record(number.sign, number.digits, number.exponent - 2, number.denominator)


def read_measure(text: str, percent: str = "divide") -> Rational | None:
    """`read`, past what layout and units add: `\\$1{,}250\\text{ km}` is 1250, `90^\\circ` is 90.

    Units are dropped and not compared, as in math-verify.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    number = read(text, percent)
    if number is None and ("\\" in text or "°" in text or " " in text):
        bare = _LAYOUT.sub("", text.replace("{,}", ","))
        number = read(_UNIT.sub("", bare.strip("$ .")), percent)
    return number


def rounds_to(answer: Rational, gold: Rational, decimals: int) -> bool:
    """Whether two numbers agree to `decimals` places after the point and, however small they are, to a thousandth (to
    a tenth for fewer than four decimals): places alone would take 1e-9 for 0."""
    a, g = answer.fraction(), gold.fraction()
    if a is None or g is None:
        return False
    return abs(a - g) <= min(Fraction(1, 2 * 10**decimals), abs(g) / (1000 if decimals > 3 else 10))


def same(left: Rational, right: Rational) -> bool:
    """Exact equality."""
    if left == right:
        return True
    if left.denominator == right.denominator:
        return False
    a, b = left.fraction(), right.fraction()
    return a is not None and a == b


def close(answer: Rational, gold: Rational, absolute: float | None, relative: float | None) -> bool:
    """Equality up to a tolerance: |answer - gold| <= max(absolute, relative·|gold|), computed exactly."""
    if same(answer, gold):
        return True
    a, g = answer.fraction(), gold.fraction()
    if a is None or g is None:
        return False
    bound = max(_written(absolute), _written(relative) * abs(g))
    return bound > 0 and abs(a - g) <= bound


def _written(tolerance: float | None) -> Fraction:
    """The tolerance as it was written: 0.3 is 3/10, not the binary number below it."""
    return Fraction(repr(tolerance)) if tolerance else Fraction(0)


def _fraction(text: str) -> Rational | None:
    latex = _LATEX_FRACTION.fullmatch(text)
    if latex:
        sign, above, below = latex.groups()
    elif text.count("/") == 1:
        sign, (above, below) = "", text.split("/")
    else:
        return None
    numerator, denominator = _decimal(above), _decimal(below)
    if numerator is None or denominator is None or not denominator.sign:
        return None
    top, bottom = numerator.fraction(), denominator.fraction()
    if top is None or bottom is None:
        return None
    value = -top / bottom if sign == "-" else top / bottom
    return _from_fraction(value)


def _scientific(text: str) -> str:
    """`3\\times10^{5}` as `3e5`, `10^5` as `1e5`, anything else as it is."""
    match = _POWER_OF_TEN.fullmatch(text[-1000:])
    if match is None or len(text) > 1000:
        return text
    return f"{match['factor'] or match['sign'] + '1'}e{match['exp']}"


def _from_fraction(value: Fraction) -> Rational | None:
    """None where the reduced form is too long to be written out."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > 3 * MAX_EXPANDED_DIGITS:
        return None
    sign = (value > 0) - (value < 0)
    return _decimal_record(sign, str(abs(value.numerator)), 0, value.denominator)


def _decimal(text: str) -> Rational | None:
    match = _DECIMAL.fullmatch(text)
    if match is None:
        return None
    whole, tail = match["whole"].replace(",", ""), match["tail"] or ""
    if not whole and not tail:
        return None
    exponent = int(match["exp"] or 0) - len(tail)
    return _decimal_record(-1 if match["sign"] == "-" else 1, whole + tail, exponent)


def _decimal_record(sign: int, digits: str, exponent: int, denominator: int = 1) -> Rational:
    significant = digits.lstrip("0")
    if not significant:
        return Rational(0, "", 0)
    short = significant.rstrip("0")
    return Rational(sign, short, exponent + len(significant) - len(short), denominator)
