"""The tests of a program: what goes in, what must come out, and how a prompt's payload says so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from treadle.actors.verify.payload import choice, non_negative
from treadle.actors.verify.programs.values import EXACT, Tolerance, same, truth
from treadle.platform.errors import DataError

if TYPE_CHECKING:
    from treadle.platform.records import Json

MAX_TESTS = 1000
COMPARISONS = ("tokens", "lines", "floats")
_FLOATS = Tolerance(absolute=1e-6, relative=1e-6)
_FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class StdinTest:
    """The program reads `stdin` and must write `stdout`, as `compare` understands equality."""

    stdin: str
    stdout: str
    compare: str = "tokens"
    tolerance: Tolerance = EXACT

    def passes(self, output: bytes) -> bool:
        """Whether this output is right. Bytes that are not UTF-8 equal nothing but themselves."""
        found = output.decode("utf-8", "surrogateescape")
        if self.compare == "lines":
            return _lines(self.stdout) == _lines(found)
        expected_tokens, found_tokens = self.stdout.split(), found.split()
        if self.compare == "tokens":
            return expected_tokens == found_tokens
        return len(expected_tokens) == len(found_tokens) and all(
            _near(one, other, self.tolerance)
            for one, other in zip(expected_tokens, found_tokens, strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTest:
    """`function(*args)` must return `returns`; see `values.same` for equality. With `only_truth` what counts
    is whether Python would take the two for true.

    Example: `CallTest(function="add", args=(1, 2), returns=3)`; a method is `Solution.add`.
    """

    function: str
    args: tuple[Json, ...]
    returns: Json
    tolerance: Tolerance = EXACT
    strict: bool = False
    only_truth: bool = False

    def passes(self, returned: Json) -> bool:
        """Whether this result is right."""
        if self.only_truth:
            return truth(returned) is bool(self.returns)
        return same(self.returns, returned, self.tolerance, self.strict)

    def __post_init__(self) -> None:
        if not _FUNCTION.fullmatch(self.function):
            raise DataError(
                f"A test calls {self.function[:80]!r}.", 'Name a function, or a method as "Class.method".'
            )


Test: TypeAlias = StdinTest | CallTest


def read_tests(payload: Mapping[str, Json]) -> list[Test]:
    """The tests of a payload.

    `tests` is a list of `{"stdin": text, "stdout": text}` and
    `{"call": {"function": name, "args": [...]}, "returns": json}`; `asserts` is Python text, see `asserts`.
    `compare` is `tokens` (split at white space; the default), `lines` (exact but for white space at line ends
    and trailing empty lines) or `floats` (tokens, numbers within `abs_tol` and `rel_tol`, both 1e-6). Raises
    `DataError`.
    """
    compare = choice(payload, "compare", COMPARISONS)
    tolerance = _tolerance(payload) if compare == "floats" else EXACT
    tests = payload.get("tests", [])
    if not isinstance(tests, list):
        raise DataError('The payload\'s "tests" is not a list.', "Give a list of tests.")
    found = [_test(test, index, compare, tolerance) for index, test in enumerate(tests)]
    if "asserts" in payload:
        # Parsing them takes `ast`, and few prompts have any.
        from treadle.actors.verify.programs.asserts import read_asserts

        found += read_asserts(payload)
    if not 0 < len(found) <= MAX_TESTS:
        raise DataError(
            f"The payload holds {len(found)} tests.", f'Give 1 to {MAX_TESTS} in "tests" or "asserts".'
        )
    return found


def _test(test: Json, index: int, compare: str, tolerance: Tolerance) -> Test:
    if isinstance(test, dict):
        stdin, stdout = test.get("stdin", ""), test.get("stdout")
        if isinstance(stdin, str) and isinstance(stdout, str):
            _encodable(stdin, index)
            return StdinTest(stdin=stdin, stdout=stdout, compare=compare, tolerance=tolerance)
        call = test.get("call")
        if isinstance(call, dict) and "returns" in test:
            function, args = call.get("function"), call.get("args")
            if isinstance(function, str) and isinstance(args, list):
                return CallTest(
                    function=function, args=tuple(args), returns=test["returns"], tolerance=tolerance
                )
    raise DataError(
        f"Test {index} of the payload is neither of input and output nor a call.",
        'Give {"stdin", "stdout"} as text, or {"call": {"function", "args"}, "returns"}.',
    )


def _encodable(text: str, index: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"The input of test {index} is not valid Unicode.", "Remove lone surrogates."
        ) from None


def _tolerance(payload: Mapping[str, Json]) -> Tolerance:
    absolute, relative = non_negative(payload, "abs_tol"), non_negative(payload, "rel_tol")
    if absolute is None and relative is None:
        return _FLOATS
    return Tolerance(absolute or 0.0, relative or 0.0)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _near(expected: str, found: str, tolerance: Tolerance) -> bool:
    if expected == found:
        return True
    try:
        return tolerance.close(float(expected), float(found))
    except ValueError:
        return False
