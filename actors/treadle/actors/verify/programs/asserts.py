"""Tests written as assertions, as HumanEval and MBPP have them, turned into calls without running them.

A test program that runs beside the candidate can be forged: whoever may define `f` may also redefine what
`assert f(1) == 2` compares. So the assertions are read as syntax. What is not one call compared with a
literal is refused, not approximated.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from treadle.actors.verify.programs.cases import CallTest
from treadle.actors.verify.programs.values import EXACT, Tolerance, encode
from treadle.platform.errors import DataError

if TYPE_CHECKING:
    from treadle.platform.records import Json

_BUILTINS = ("abs", "round", "set", "sorted", "len", "tuple", "list", "math", "isclose")


def read_asserts(payload: Mapping[str, Json]) -> list[CallTest]:
    """`asserts` (Python text, or a list of such lines) and, where it calls its candidate by another name,
    `entry_point` (the function's name in the program). Raises `DataError` naming the line that cannot be read.

    Read are `f(…) == literal` either way round, `is` and `==` with None, True and False, `f(…)` (is
    true), `not f(…)` (is not), `abs(f(…) - literal) < bound` and `math.isclose(f(…), literal)`;
    alone or as the body of `def check(candidate)`. Types count as in Python: a tuple is not a list.
    """
    text = payload["asserts"]
    if isinstance(text, list):
        text = "\n".join(str(line) for line in text)
    entry = payload.get("entry_point", "")
    if not isinstance(text, str) or not isinstance(entry, str):
        raise DataError('The payload\'s "asserts" or "entry_point" is not text.', "Give Python text.")
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f'The payload\'s "asserts" is not Python: {error}.', "Correct it.") from error
    return [_call_test(node.test, entry, node.lineno) for node in _assertions(body)]


def _assertions(body: list[ast.stmt]) -> Iterator[ast.Assert]:
    """The assertions of a module or of its `check` function. Metadata, docstrings, imports and the call of
    `check` are passed over; any other statement might be part of a test."""
    for node in body:
        match node:
            case ast.Assert():
                yield node
            case ast.FunctionDef(name="check", body=inner):
                yield from _assertions(inner)
            case ast.Expr(value=ast.Constant()) | ast.Import() | ast.ImportFrom() | ast.Pass():
                continue
            case ast.Assign(targets=[ast.Name(id="METADATA")]):
                continue
            case ast.Expr(value=ast.Call(func=ast.Name(id="check"))):
                continue
            case _:
                raise _unreadable(node.lineno)


def _call_test(test: ast.expr, entry: str, line: int) -> CallTest:
    match test:
        case ast.Compare(left=left, ops=[ast.Eq() | ast.Is()], comparators=[right]):
            call, literal = (left, right) if isinstance(left, ast.Call) else (right, left)
            return _made(call, literal, entry, line)
        case ast.Compare(
            left=ast.Call(func=ast.Name(id="abs"), args=[ast.BinOp(left=left, op=ast.Sub(), right=right)]),
            ops=[ast.Lt() | ast.LtE()],
            comparators=[bound],
        ):
            call, literal = (left, right) if isinstance(left, ast.Call) else (right, left)
            absolute = _literal(bound, line)
            if not isinstance(absolute, int | float):
                raise _unreadable(line)
            return _made(call, literal, entry, line, Tolerance(absolute=float(absolute)))
        case ast.Call(func=ast.Attribute(attr="isclose"), args=[call, literal], keywords=keywords):
            given = {word.arg: _literal(word.value, line) for word in keywords}
            relative, absolute = given.get("rel_tol", 1e-9), given.get("abs_tol", 0.0)
            if not isinstance(relative, int | float) or not isinstance(absolute, int | float):
                raise _unreadable(line)
            return _made(call, literal, entry, line, Tolerance(float(absolute), float(relative)))
        case ast.UnaryOp(op=ast.Not(), operand=ast.Call() as call):
            return _made(call, ast.Constant(False), entry, line, only_truth=True)
        case ast.Call():
            return _made(test, ast.Constant(True), entry, line, only_truth=True)
        case _:
            raise _unreadable(line)


def _made(
    call: ast.expr,
    expected: ast.expr,
    entry: str,
    line: int,
    tolerance: Tolerance = EXACT,
    only_truth: bool = False,
) -> CallTest:
    match call:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name not in _BUILTINS:
            function = entry if entry and name == "candidate" else name
            return CallTest(
                function=function,
                args=tuple(encode(_literal(arg, line)) for arg in args),
                returns=encode(_literal(expected, line)),
                tolerance=tolerance,
                strict=True,
                only_truth=only_truth,
            )
        case _:
            raise _unreadable(line)


def _literal(node: ast.expr, line: int) -> object:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise _unreadable(line) from None


def _unreadable(line: int) -> DataError:
    return DataError(
        f'Line {line} of the payload\'s "asserts" is not a call compared with a literal.',
        'Write it as `assert f(args) == value`, or give the test in "tests".',
    )
