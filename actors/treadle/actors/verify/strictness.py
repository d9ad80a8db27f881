r"""What the `math` verifier refuses although math-verify accepts it, decided on the text of the answer.

Each rule closes a way to earn the reward without solving the task: restating the question (`8!` for 40320), offering
several values (`3=4`), leaving the form open (`50` for 50 %, `{1,2}` for (1,2), `101` for 101 in base 2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from treadle.actors.verify import rational
from treadle.platform.errors import ConfigError, DataError

if TYPE_CHECKING:
    from treadle.platform.records import Json

PERCENT = ("divide", "ignore", "either")
MAX_NESTING = 12
"""The parser takes seconds for 20 nested brackets and minutes for 40; answers nest half a dozen."""

_OPEN = re.compile(r"\\(?:sum|prod|i*int|oint|lim|det)(?![a-z])")
"""Work that a question asks for. In an answer it is left to the grader, unless the expected answer has it too."""
_CLOSED = re.compile(
    r"\\(?:[dt]?binom|choose|gcd|lcm|max|min|lfloor|lceil|bmod|mod)(?![a-z])"
    r"|(?<![a-zA-Z\\])(?:gcd|lcm|max|min|mod|binom|factorial)\s*\(|[0-9a-z)}\]]\s*!(?!=)"
)
"""Functions that may close a formula (`\\binom{n}{2}`), and restate the question where a number is expected."""
_LIGHT = re.compile(
    r"[0-9)}\]]\s*[+*×·÷-]"
    r"|[0-9)]\s*(?:\^(?!\s*\{?\s*\\circ)|\*\*)"
    r"|[0-9)}]\s*(?:\\left\s*)?\(\s*[-+0-9\\(]"
    r"|\\(?:times|cdot|div|ast|sqrt|log|ln|lg|exp|sin|cos|tan|cot|sec|csc|arc[a-z]+|[lr]?vert)(?![a-z])"
    r"|(?<![a-zA-Z\\])(?:sqrt|log|ln|exp|sin|cos|tan|abs)\s*\(|\|"
    r"|(?<![a-zA-Z\\])([a-zA-Z])\s*(?:[+*-]|/\s*\1(?![a-zA-Z]))"
)
"""Arithmetic. Where plain numbers are expected, `1+1` for 2 repeats the question."""
_DIVISION = re.compile(r"[0-9)}]\s*[/÷]\s*[-0-9(\\]|\\[dtc]?frac(?![a-z])")
_CHOICE = re.compile(
    r"(?<![a-zA-Z])(?:or|and|either|versus|vs)(?![a-zA-Z])|或|±|\\(?:lor|vee|land|wedge|pm|mp)(?![a-z])"
    r"|\\(?:implies|iff|to|[Rr]ightarrow|[Ll]eftrightarrow|[Ll]ong(?:left)?rightarrow|mapsto)(?![a-z])|[→⇒⇔]|[-=]>"
)
"""Between several values, or steps that lead from one to another."""
_SCALE = re.compile(r"[mbtr]illion|thousand|hundred|dozen")
"""Words that the parser would drop like a unit."""
_LETTERED = re.compile(r"[-+]?[0-9][0-9.,]*([A-Za-z])")
"""A number with one letter at it is a product or a numeral (`3m`, `5A`); the parser takes the letter for a unit."""
_EQUALS = re.compile(r"(?<![<>!:\\=])=(?![=>])|\\equiv(?![a-z])")
_NEARLY = re.compile(r"\\(?:approx|simeq|doteq)(?![a-z])|≈")
_NAMES = re.compile(
    r"\\(?:[dtc]?frac|sqrt|cdot|times|div|left|right|pi|displaystyle|q?quad)(?![a-z])|\\text\{[^{}]*\}"
)
_LETTER = re.compile(r"[^\W\d_]")
_SEPARATOR = re.compile(
    r"(?<!\\)[,;]|、|\\c[au]p(?![a-z])|\\q?quad(?![a-z])|(?<![a-zA-Z])(?:or|and)(?![a-zA-Z])|\\text\s*\{[\s,]*(?:and|or)[\s,]*\}"
)
_GROUPED = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_BASED = re.compile(r"([0-9A-Za-z]+)_(?:([0-9]{1,2})|\{\s*(?:\\text\s*\{\s*)?([0-9]{1,2})[\s}]*\})")
_PERCENT_SIGN = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*(?:percent|\\?%)\s*\}|\bpercent(?:age)?\b|\bpct\b)")
_PERCENTAGE = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)%")
_SPACING = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-z])|\\[,;!: ]|[\s~]")
_NAME = re.compile(r"[A-Za-z\\|(][^-+*/^=]*")
_OPERATION = re.compile(r"\\(?:[dtc]?frac|sqrt|cdot|times)(?![a-z])")
_BRACE = re.compile(r"\\\\|\\[{}]|[{}]")
_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])")
_DEPTH = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


@dataclass(frozen=True, slots=True, kw_only=True)
class MathRules:
    """How strict the `math` verifier is; see `symbolic.MathVerifier` for what each rule means."""

    allow_unevaluated: bool = False
    allow_chains: bool = False
    allow_alternatives: bool = False
    allow_set_for_tuple: bool = False
    allow_missing_base: bool = False
    last_box_counts: bool = True
    percent: str = PERCENT[0]
    decimals: int = 6

    def check(self, where: str) -> None:
        """Raises `ConfigError`; `where` is what the setting's name follows."""
        if self.percent not in PERCENT:
            raise ConfigError(
                f"{where}percent={self.percent!r} is unknown.", f"Use one of {', '.join(PERCENT)}."
            )
        if not 0 <= self.decimals <= 15:
            raise ConfigError(
                f"{where}decimals={self.decimals} is not between 0 and 15.", "Set 6, the default."
            )

    def for_prompt(self, payload: Mapping[str, Json]) -> MathRules:
        """These rules with what the payload changes. Raises `DataError` for a value of another type."""
        changed: dict[str, Json] = {}
        for rule in fields(self):
            if rule.name not in payload:
                continue
            value = payload[rule.name]
            if type(value) is not type(getattr(self, rule.name)):
                raise DataError(
                    f'The payload\'s "{rule.name}" is {str(value)[:80]!r}.',
                    f"Give a {rule.type}, or leave it out.",
                )
            changed[rule.name] = value
        if not changed:
            return self
        rules = replace(self, **changed)  # type: ignore[arg-type]  # compared with the fields' types above
        try:
            rules.check("The payload's ")
        except ConfigError as error:
            raise DataError(error.message, error.remedy) from error
        return rules

    def changes(self) -> list[str]:
        """The rules that differ from the defaults, for the verifier's version."""
        return [
            f"{rule.name}={getattr(self, rule.name)}"
            for rule in fields(self)
            if getattr(self, rule.name) != rule.default
        ]


def refused(gold: str, answer: str, rules: MathRules) -> bool:
    """Whether a rule rejects the answer, however the parser would judge it."""
    return (
        broken_off(answer)
        or _SCALE.findall(gold) != _SCALE.findall(answer)
        or _loses_letter(gold, answer)
        or _loses_letter(answer, gold)
        or (not rules.allow_unevaluated and _left_to_grader(gold, answer))
        or (not rules.allow_alternatives and _offers_choice(gold, answer))
        or (not rules.allow_set_for_tuple and {_brackets(gold), _brackets(answer)} == {"set", "tuple"})
    )


def same_numeral(gold: str, answer: str, allow_missing_base: bool) -> bool | None:
    """Compares numerals in a written base (`101_2`); None where neither is one. A numeral without a base is in
    another base, unless it may go unwritten."""
    texts = [_split(text, _EQUALS)[-1].strip() for text in (gold, answer)]
    numerals = [_BASED.fullmatch(text) for text in texts]
    bases = {int(numeral[2] or numeral[3]) for numeral in numerals if numeral}
    if not bases:
        return None
    if len(bases) > 1 or not (allow_missing_base or all(numerals)):
        return False
    digits = [numeral[1] if numeral else text for numeral, text in zip(numerals, texts, strict=True)]
    return digits[0].lstrip("0").casefold() == digits[1].lstrip("0").casefold()


def with_percent(text: str, percent: str) -> str:
    """The text with percentages as the rule reads them: `50%` as a hundredth part, or as 50."""
    text = _PERCENT_SIGN.sub("%", text)
    if percent == "divide":
        return _PERCENTAGE.sub(r"\\frac{\1}{100}", text)
    return text.replace("%", "") if percent == "ignore" else text.replace("%", "\\%")


def broken_off(answer: str) -> bool:
    """Whether the text is no single formula: braces that do not match would close the parser's box early, brackets
    nested deeper than `MAX_NESTING` keep it busy for ever, and two statements about the same thing (`x=3 x=4`) read as
    one chain."""
    depth = 0
    for brace in _BRACE.finditer(answer):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth < 0:
            return True
    nested = max(accumulate((_DEPTH.get(char, 0) for char in answer), initial=0))
    if depth or nested > MAX_NESTING or _BOX.search(answer):
        return True
    for piece in _split(answer, _SEPARATOR):
        first, *middle = [link.strip() for link in _split(piece, _EQUALS)[:-1]] or [""]
        if first and any(link.endswith(first) for link in middle):
            return True
    return False


def chains(answer: str) -> list[tuple[str, str, int | None]]:
    """Numbers of which the answer says that they are equal, in pairs, with the decimals to which they must be: those
    of the rounder one; None for exactly. Links with variables claim something of the variables and are left out.

    Example: `chains("x = 17/3 = 5.67 \\approx 6")` is `[("17/3", "5.67", 2), ("5.67", "6", 0)]`.
    """
    pairs: list[tuple[str, str, int | None]] = []
    for piece in _split(_GROUPED.sub("", answer), _SEPARATOR):
        links = [
            (link.strip(), index > 0)
            for part in _split(piece, _EQUALS)
            for index, link in enumerate(_split(part, _NEARLY))
            if link.strip() and not _has_letters(link)
        ]
        for (left, _), (right, nearly) in pairwise(links):
            pairs.append((left, right, (_decimals(right) or 0) if nearly else _decimals(left, right)))
    return pairs


def _decimals(*numbers: str) -> int | None:
    return min((len(number.strip().partition(".")[2]) for number in numbers if "." in number), default=None)


def unreduced(gold: str, answer: str) -> bool:
    """Whether a division stands where whole numbers are expected."""
    return _DIVISION.search(answer) is not None and all(map(_whole, _numbers(gold)))


def values(text: str) -> list[str]:
    """What the text commits to, piece by piece: `2+3=5` and `x=5` commit to 5, the `k=1` below a sum to nothing, and
    `2x+y=0` to the equation."""
    return [_value(piece) for piece in _split(text, _SEPARATOR)]


def _value(piece: str) -> str:
    left, *right = _split(piece, _EQUALS)
    if not right:
        return piece.strip()
    named = _NAME.fullmatch(left.strip()) and not _OPERATION.search(left)
    computed = not _has_letters(left) and rational.read_measure(right[-1]) is not None
    return right[-1].strip() if named or computed else piece.strip()


def _has_letters(text: str) -> bool:
    return _LETTER.search(_NAMES.sub("", text)) is not None


def _numbers(gold: str) -> list[str]:
    """The members of the expected answer, where all of them are plain numbers or infinite; else nothing."""
    members = [member for value in values(gold) for member in _elements(value)]
    plain = all(m.lstrip("+-") == "\\infty" or rational.read_measure(m) is not None for m in members)
    return members if plain else []


def _whole(number: str) -> bool:
    return "." not in number and "%" not in number and not _DIVISION.search(number)


def _left_to_grader(gold: str, answer: str) -> bool:
    found = values(answer)
    if any(map(_OPEN.search, found)):
        return not _OPEN.search(gold)
    if any(map(_CLOSED.search, found)) and not _CLOSED.search(gold) and not _has_letters(gold):
        return True
    numbers = _numbers(gold)
    return bool(numbers) and any(
        _LIGHT.search(v) or (_DIVISION.search(v) and all(map(_whole, numbers))) for v in found
    )


def _loses_letter(text: str, other: str) -> bool:
    lettered = _LETTERED.fullmatch(text)
    return lettered is not None and lettered[1] not in other


def _offers_choice(gold: str, answer: str) -> bool:
    if rational.read_measure(gold) is None and len(_elements(gold)) > 1:
        return False
    statements = [piece for piece in _split(answer, _SEPARATOR) if len(_split(piece, _EQUALS)) > 1]
    return len(statements) > 1 or (_CHOICE.search(answer) is not None and _CHOICE.search(gold) is None)


def _brackets(text: str) -> str:
    """`set` for several elements in braces, `tuple` for several in other brackets, else nothing."""
    bare = _SPACING.sub("", _split(text, _EQUALS)[-1])
    if not _wrapped(bare) or len(_elements(bare)) < 2:
        return ""
    return "set" if bare[0] == "\\" else "tuple"


def _elements(text: str) -> list[str]:
    """The members of a list, tuple, set or interval; a single value is its own and only one."""
    bare = _SPACING.sub("", text)
    if _wrapped(bare):
        bare = bare[2:-2] if bare[0] == "\\" else bare[1:-1]
    return _split(bare, _SEPARATOR)


def _wrapped(bare: str) -> bool:
    """Whether one pair of brackets, `\\{ \\}` included, goes around everything."""
    if not (bare.startswith(("(", "[", "\\{")) and bare.endswith((")", "]", "\\}"))):
        return False
    depth = 0
    for position, char in enumerate(bare):
        depth += _DEPTH.get(char, 0)
        if depth == 0 and position > 1:
            return position == len(bare) - 1
    return False


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Cuts at the separators that stand outside all brackets."""
    cuts = {match.start(): match.end() for match in separator.finditer(text)}
    if not cuts:
        return [text]
    depth, begin, pieces = 0, 0, []
    for position, char in enumerate(text):
        if depth == 0 and position >= begin and position in cuts:
            pieces.append(text[begin:position])
            begin = cuts[position]
        depth += _DEPTH.get(char, 0)
    return [*pieces, text[begin:]]
