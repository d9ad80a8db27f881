"""Finding the program in a completion, reading tests from a payload, comparing values."""

from __future__ import annotations

import math
from typing import Any

import pytest

from treadle.actors.verify.programs.asserts import read_asserts
from treadle.actors.verify.programs.cases import CallTest, StdinTest, read_tests
from treadle.actors.verify.programs.extract import program_text
from treadle.actors.verify.programs.languages import LANGUAGES, language_of, main_class, toolchain
from treadle.actors.verify.programs.values import Tolerance, encode, same, truth
from treadle.platform.errors import DataError

BLOCK = "```python\nprint(1)\n```"


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        (BLOCK, "print(1)\n"),
        (f"First\n```\nprint(0)\n```\nno, rather\n{BLOCK}\nThat is it.", "print(1)\n"),
        ("```py\nprint(1)\n```", "print(1)\n"),
        ("```PYTHON\nprint(1)\n```", "print(1)\n"),
        ("```python3 title=x\nprint(1)\n```", "print(1)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("```text\nprint(1)\n```", "print(1)\n"),
        ("~~~python\nprint(1)\n~~~", "print(1)\n"),
        ("````python\nprint('```')\n```\n````", "print('```')\n```\n"),
        ("```python\r\nprint(1)\r\n```\r\n", "print(1)\r\n"),
        ("  ```python\n  print(1)\n  ```", "  print(1)\n"),
        (f"<think>{BLOCK}</think>```python\nprint(2)\n```", "print(2)\n"),
        (f"<think>x</think><answer>\n{BLOCK}\n</answer>", "print(1)\n"),
        ("```python\nprint('\\\\boxed{5}')\n```", "print('\\\\boxed{5}')\n"),
        # another language is another answer
        ("```cpp\nint main() {}\n```", ""),
        (f"{BLOCK}\n```js\nconsole.log(1)\n```", ""),
        # cut off, or nothing at all
        ("```python\nprint(1)\n", ""),
        (f"{BLOCK}\nor rather\n```python\nprint(2)", ""),
        (f"<think>{BLOCK}</think>", ""),
        (f"<think>x</think><answer>{BLOCK}", ""),
        ("print(1)", ""),
        ("```python```", ""),
        ("", ""),
        ("```python\n```", "\n"),
        ("inline ```python\nprint(1)\n```", ""),
    ],
)
def test_the_last_closed_block_is_the_program(completion: str, code: str) -> None:
    assert program_text(completion, "python", bare=False) == code


def test_without_a_fence_the_answer_is_a_program_only_where_it_may_be() -> None:
    assert program_text("<think>x</think> print(1) ", "python", bare=True) == "print(1)"
    assert program_text(BLOCK, "python", bare=True) == "print(1)\n"
    assert program_text("```cpp\nint main() {}\n```", "python", bare=True) == ""
    assert program_text("```python\nprint(1)", "python", bare=True) == ""


def test_finding_the_program_is_linear() -> None:
    for text in ("```\n" * 200_001, "`" * 500_000, "```python\n" + "x\n" * 200_000, "~" * 200_000 + "\n```"):
        program_text(text, "python", bare=False)


def test_languages_have_other_names_and_java_its_main_class() -> None:
    assert [language_of(tag) for tag in ("C++", "js", "sh", "rs", "py3", "cobol", "")] == [
        "cpp",
        "javascript",
        "bash",
        "rust",
        "python",
        None,
        None,
    ]
    assert main_class("java", "import x;\npublic final class Foo { }") == "Foo"
    assert main_class("java", "class Foo { }") == "Main"
    assert main_class("c", "public class Foo") == "Main"


def test_a_language_without_tools_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="no language 'cobol'"):
        toolchain("cobol")
    broken = {**LANGUAGES}
    assert "python3" in toolchain("python").tools
    assert set(broken) == {"python", "c", "cpp", "javascript", "java", "rust", "bash"}


@pytest.mark.parametrize(
    ("compare", "output", "passes"),
    [
        ("tokens", b"1  2\n\n3", True),
        ("tokens", b"1 2 3 4", False),
        ("tokens", b"1 2", False),
        ("tokens", b"1.0 2 3", False),
        ("lines", b"1 2\n3\n\n", True),
        ("lines", b"1 2 \r\n3", True),
        ("lines", b"1  2\n3", False),
        ("lines", b"1 2\n\n3", False),
        ("lines", b" 1 2\n3", False),
        ("floats", b"1.0000001 2e0 3", True),
        ("floats", b"1.1 2 3", False),
        ("floats", b"nan 2 3", False),
        ("floats", b"1 2 inf", False),
        ("floats", b"1 2", False),
        ("tokens", b"1 2 3\xff", False),
    ],
)
def test_output_is_compared_as_asked(compare: str, output: bytes, passes: bool) -> None:
    (test,) = read_tests({"tests": [{"stdin": "", "stdout": "1 2\n3\n"}], "compare": compare})
    assert isinstance(test, StdinTest)
    assert test.passes(output) is passes


def test_a_tolerance_of_the_prompt_replaces_the_default() -> None:
    payload: dict[str, Any] = {"tests": [{"stdin": "", "stdout": "100"}], "compare": "floats", "abs_tol": 1}
    (test,) = read_tests(payload)
    assert isinstance(test, StdinTest)
    assert test.passes(b"100.9")
    assert not test.passes(b"101.1")


BAD_PAYLOADS: list[dict[str, Any]] = [
    {},
    {"tests": []},
    {"tests": "x"},
    {"tests": [{}]},
    {"tests": [{"stdin": 1, "stdout": "x"}]},
    {"tests": [{"stdin": "x"}]},
    {"tests": [{"stdin": "\ud800", "stdout": "x"}]},
    {"tests": [{"call": {"function": "f"}, "returns": 1}]},
    {"tests": [{"call": {"function": "f", "args": 1}, "returns": 1}]},
    {"tests": [{"call": {"function": "f", "args": []}}]},
    {"tests": [{"call": {"function": "f()", "args": []}, "returns": 1}]},
    {"tests": [{"call": {"function": "a.b.c", "args": []}, "returns": 1}]},
    {"tests": [{"stdin": "", "stdout": "x"}] * 1001},
    {"tests": [{"stdin": "", "stdout": "x"}], "compare": "fuzzy"},
    {"tests": [{"stdin": "", "stdout": "x"}], "compare": "floats", "abs_tol": -1},
    {"asserts": 3},
    {"asserts": "assert f(1) =="},
    {"asserts": ""},
]


@pytest.mark.parametrize("payload", BAD_PAYLOADS)
def test_a_payload_that_says_nothing_usable_is_refused(payload: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        read_tests(payload)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("assert f(1, 'x') == [2]", CallTest(function="f", args=(1, "x"), returns=[2], strict=True)),
        ("assert 3 == f(-1)", CallTest(function="f", args=(-1,), returns=3, strict=True)),
        ("assert f() is None", CallTest(function="f", args=(), returns=None, strict=True)),
        ("assert f() is False, 'why'", CallTest(function="f", args=(), returns=False, strict=True)),
        ("assert f(0)", CallTest(function="f", args=(0,), returns=True, strict=True, only_truth=True)),
        ("assert not f(0)", CallTest(function="f", args=(0,), returns=False, strict=True, only_truth=True)),
        (
            "assert f((1, 2), {1: 2}) == {3}",
            CallTest(
                function="f",
                args=({"$tuple": [1, 2]}, {"$dict": [[1, 2]]}),
                returns={"$set": [3]},
                strict=True,
            ),
        ),
        (
            "assert abs(f(1) - 0.5) < 1e-3",
            CallTest(function="f", args=(1,), returns=0.5, strict=True, tolerance=Tolerance(absolute=1e-3)),
        ),
        (
            "assert math.isclose(f(1), 0.5, rel_tol=0.1)",
            CallTest(function="f", args=(1,), returns=0.5, strict=True, tolerance=Tolerance(0.0, 0.1)),
        ),
        ("assert candidate(1) == 1", CallTest(function="g", args=(1,), returns=1, strict=True)),
    ],
)
def test_assertions_are_read_as_calls(line: str, expected: CallTest) -> None:
    assert read_asserts({"asserts": line, "entry_point": "g"}) == [expected]
    assert read_asserts({"asserts": [line, line], "entry_point": "g"}) == [expected] * 2


@pytest.mark.parametrize(
    "line",
    [
        "assert f(x) == 1",
        "assert f(1) == g(1)",
        "assert f(1) != 2",
        "assert f(1) < 2",
        "assert f(1) == 1 and f(2) == 2",
        "assert sorted(f(1)) == [1]",
        "assert abs(f(1)) == 1",
        "assert f(*[1]) == 1",
        "assert f(a=1) == 1",
        "assert f(1)[0] == 1",
        "assert f(1) == b'x'",
        "assert f(1).x == 1",
        "x = f(1)",
        "for i in range(3): assert f(i) == i",
        "__import__('os').system('x')",
        "assert True",
        "def other(): pass",
    ],
)
def test_an_assertion_that_is_more_than_a_call_and_a_literal_is_refused(line: str) -> None:
    with pytest.raises(DataError):
        read_tests({"asserts": line})


SAME: list[tuple[Any, Any]] = [
    (1, 1),
    (1, 1.0),
    (0.5, 0.5),
    (None, None),
    (True, True),
    ("é", "é"),
    ([1, [2]], [1, [2]]),
    ([1, 2], {"$tuple": [1, 2]}),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({"$set": [1, 2]}, {"$set": [2, 1]}),
    ({"$dict": [[1, "a"], [2, "b"]]}, {"$dict": [[2, "b"], [1, "a"]]}),
    (12345678901234567890, {"$int": "12345678901234567890"}),
    (10**21, 1e21),
]
DIFFERENT: list[tuple[Any, Any]] = [
    (1, True),
    (0, False),
    (True, 1),
    (0, None),
    ("1", 1),
    (1, "1"),
    ([], {}),
    ([], ""),
    ([1, 2], [2, 1]),
    ([1], [1, 1]),
    ({"a": 1}, {"a": 1, "b": 2}),
    ({"a": 1}, {"a": True}),
    ({"$set": [1]}, [1]),
    ({"$set": [1]}, {"$set": [1, 1]}),
    (0.1, 0.1000001),
    (math.inf, math.inf),
    ({"$float": "nan"}, {"$float": "nan"}),
    ({"$other": "x"}, {"$other": "x"}),
    (1, {"$int": "x"}),
    (1, {"$int": 1}),
    ("x", {"$tuple": "x"}),
    (1, {"$tuple": [1]}),
]


@pytest.mark.parametrize(("expected", "found"), SAME)
def test_equal_values_are_the_same(expected: Any, found: Any) -> None:
    assert same(expected, found)


@pytest.mark.parametrize(("expected", "found"), DIFFERENT)
def test_values_that_differ_are_not(expected: Any, found: Any) -> None:
    assert not same(expected, found)
    assert not same(expected, found, Tolerance(1e-9, 1e-9))


def test_with_types_as_in_python_a_tuple_is_no_list() -> None:
    assert same({"$tuple": [1]}, {"$tuple": [1]}, strict=True)
    assert not same([1], {"$tuple": [1]}, strict=True)
    assert not same({"$tuple": [1]}, [1], strict=True)


def test_numbers_within_the_tolerance_are_the_same() -> None:
    assert same([1.0, {"x": 2}], [1.0000001, {"x": 2.0000001}], Tolerance(1e-6))
    assert not same(1.0, 1.1, Tolerance(1e-6, 1e-6))
    assert same(10**400, 10**400, Tolerance(1e-6))
    assert not same(10**400, 1.0, Tolerance(1e-6))


def test_comparing_ends_at_any_depth() -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    assert not same(1, deep)
    assert not same(deep, deep)


def test_truth_is_as_in_python() -> None:
    falsy: list[Any] = [None, False, 0, 0.0, "", [], {}, {"$tuple": []}, {"$set": []}, {"$dict": []}]
    assert [truth(value) for value in falsy] == [False] * len(falsy)
    assert [truth(value) for value in (1, "0", [0], {"a": 0}, {"$tuple": [0]}, {"$float": "nan"})] == [
        True
    ] * 6
    assert truth({"$other": "Thing"}) is None


def test_literals_cross_with_their_types() -> None:
    assert encode({"a": (1, [2.5, None])}) == {"a": {"$tuple": [1, [2.5, None]]}}
    assert encode({"$a": 1}) == {"$dict": [["$a", 1]]}
    assert encode({1: {2}}) == {"$dict": [[1, {"$set": [2]}]]}
    assert encode(math.inf) == {"$float": "inf"}
    with pytest.raises(DataError):
        encode(b"x")
