"""The `code` verifier, by itself and in the pool."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from tests.actors.verify.pool_helpers import judged, running, statuses

from treadle.actors.verify.config import VerifyConfig
from treadle.actors.verify.programs.languages import LANGUAGES
from treadle.actors.verify.programs.verifier import CodeVerifier
from treadle.platform.contracts import Verifier
from treadle.platform.errors import ConfigError, DataError
from treadle.platform.records import Json

pytestmark = pytest.mark.processes

CALLS: dict[str, Any] = {
    "tests": [{"call": {"function": "half", "args": [n]}, "returns": n // 2} for n in (4, 7, 0, -3)]
}
RIGHT = "def half(n): return n // 2"
MOSTLY = "def half(n): return int(n / 2)"  # wrong for -3
INPUTS: dict[str, Any] = {"tests": [{"stdin": f"{n}\n", "stdout": f"{n * n}\n"} for n in (3, 0, -2, 5)]}


@pytest.fixture(scope="module")
def verifier() -> Iterator[CodeVerifier]:
    opened = CodeVerifier()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def sharing() -> Iterator[CodeVerifier]:
    """With partial credit."""
    opened = CodeVerifier(partial=True, time_limit_s=1.5, total_s=6.0)
    yield opened
    opened.close()


def answer(code: str, tag: str = "python") -> str:
    return f"<think>let me see</think>\nHere:\n```{tag}\n{code}\n```\n"


def accuracy(verifier: CodeVerifier, code: str, payload: Mapping[str, Json], tag: str = "python") -> float:
    ((name, value),) = verifier.score(answer(code, tag), payload)
    assert name == "accuracy"
    assert type(value) is float
    return value


def test_it_is_a_verifier_whose_version_names_tier_and_tools(verifier: CodeVerifier) -> None:
    assert isinstance(verifier, Verifier)
    assert verifier.name == "code"
    assert re.match(
        r"1 \((bubblewrap [\d.]+|landlock \d+), seccomp, rlimits; python 3\.\d+\.\d+", verifier.version
    )


def test_right_is_one_and_wrong_is_zero(verifier: CodeVerifier) -> None:
    assert accuracy(verifier, RIGHT, CALLS) == 1.0
    assert accuracy(verifier, MOSTLY, CALLS) == 0.0
    assert accuracy(verifier, "print(int(input()) ** 2)", INPUTS) == 1.0
    assert accuracy(verifier, "print(int(input()) * 3)", INPUTS) == 0.0


def test_an_answer_without_a_program_is_wrong_and_runs_nothing(verifier: CodeVerifier) -> None:
    for text in ("", "I do not know", "```python\nprint(1)", f"<think>{answer(RIGHT)}</think>"):
        assert verifier.score(text, CALLS) == (("accuracy", 0.0),)


def test_partial_credit_is_the_share_of_tests(sharing: CodeVerifier) -> None:
    assert accuracy(sharing, RIGHT, CALLS) == 1.0
    assert accuracy(sharing, MOSTLY, CALLS) == 0.75
    assert accuracy(sharing, "print(abs(int(input())) * 3)", INPUTS) == 0.5
    assert accuracy(sharing, "raise SystemExit", CALLS) == 0.0


@pytest.mark.parametrize(
    "fault", ["os._exit(0)", "time.sleep(9)", "raise ValueError", "sys.exit(0)", "os.kill(os.getpid(), 9)"]
)
def test_a_call_that_does_not_return_costs_its_own_test_only(sharing: CodeVerifier, fault: str) -> None:
    code = f"import os, sys, time\ndef half(n):\n    if n == 7: {fault}\n    return n // 2"
    assert accuracy(sharing, code, CALLS) == 0.75


def test_a_program_has_so_much_time_in_all(sharing: CodeVerifier) -> None:
    code = "import time\ntime.sleep(0.6)\nprint(int(input()) ** 2)"
    tests: list[Json] = [{"stdin": "2\n", "stdout": "4"}] * 20
    share = accuracy(sharing, code, {"tests": tests})
    assert 0.1 <= share <= 0.5


def test_functions_do_not_see_each_others_arguments_change(verifier: CodeVerifier) -> None:
    tests: list[Json] = [{"call": {"function": "f", "args": [[1, 2]]}, "returns": [1, 2, 3]}] * 2
    assert accuracy(verifier, "def f(x):\n    x.append(3)\n    return x", {"tests": tests}) == 1.0


def test_inputs_and_calls_may_be_mixed(verifier: CodeVerifier) -> None:
    tests = [*CALLS["tests"], *INPUTS["tests"], *CALLS["tests"]]
    code = f"{RIGHT}\nif __name__ == '__main__':\n    print(int(input()) ** 2)"
    assert accuracy(verifier, code, {"tests": tests}) == 1.0


def test_what_a_program_prints_while_it_is_called_does_not_matter(verifier: CodeVerifier) -> None:
    code = f"print('x' * 100000)\nimport sys\nsys.stderr.write('y')\n{RIGHT}\nprint(half(1))"
    assert accuracy(verifier, code, CALLS) == 1.0


def test_input_is_empty_for_a_function(verifier: CodeVerifier) -> None:
    code = "import sys\nread = sys.stdin.read()\ndef f(): return [read, sys.stdin.read()]"
    payload: dict[str, Any] = {"tests": [{"call": {"function": "f", "args": []}, "returns": ["", ""]}]}
    assert accuracy(verifier, code, payload) == 1.0


def test_values_of_python_cross_both_ways(verifier: CodeVerifier) -> None:
    payload: dict[str, Any] = {
        "asserts": [
            "assert f((1, 2), {3}, {4: 'x'}) == ((2, 1), {3, 5}, {4: ('x',)})",
            "assert f((), set(), {}) == ((), {5}, {})",
        ]
    }
    code = "def f(t, s, d): return t[::-1], s | {5}, {k: (v,) for k, v in d.items()}"
    assert accuracy(verifier, code, payload) == 1.0
    assert accuracy(verifier, code.replace("t[::-1]", "list(t)[::-1]"), payload) == 0.0


def test_results_that_json_reads_otherwise_come_whole(verifier: CodeVerifier) -> None:
    big = 2**200 + 1
    payload: dict[str, Any] = {
        "tests": [
            {"call": {"function": "f", "args": [n]}, "returns": r} for n, r in ((0, big), (1, "é\u2028\x00"))
        ]
    }
    code = f"def f(n): return [{big}, 'é\\u2028\\x00'][n]"
    assert accuracy(verifier, code, payload) == 1.0
    script = f"function f(n) {{ return [{big}n, 'é\\u2028\\x00'][n]; }}"
    assert accuracy(verifier, script, payload | {"language": "javascript"}, "js") == 1.0


def test_a_prompt_may_set_its_limits_within_the_runs(verifier: CodeVerifier) -> None:
    slow = "import time\ntime.sleep(0.5)\n" + RIGHT
    assert accuracy(verifier, slow, CALLS | {"time_limit_s": 0.3}) == 0.0
    assert accuracy(verifier, slow, CALLS | {"time_limit_s": 3}) == 1.0
    large = "x = bytearray(200 * 2**20)\n" + RIGHT
    assert accuracy(verifier, large, CALLS) == 1.0
    assert accuracy(verifier, large, CALLS | {"memory_bytes": 100 * 2**20}) == 0.0


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ({}, "0 tests"),
        (CALLS | {"time_limit_s": 100}, "verify.options.code.total_s"),
        (CALLS | {"time_limit_s": -1}, "time_limit_s"),
        (CALLS | {"memory_bytes": 2**50}, "verify.options.code.memory_bytes"),
        (CALLS | {"language": "cobol"}, "language"),
        (CALLS | {"language": "c"}, "Calls of functions are not offered for c"),
    ],
)
def test_an_unusable_payload_raises_and_names_what_to_change(
    verifier: CodeVerifier, payload: dict[str, Any], says: str
) -> None:
    tag = str(payload.get("language", "python"))
    with pytest.raises(DataError, match=re.escape(says)):
        verifier.score(answer(RIGHT, tag), payload)


def test_a_language_the_run_does_not_accept_is_the_datas_fault() -> None:
    opened = CodeVerifier(languages="python, bash")
    try:
        assert "bash" in opened.version
        assert "javascript" not in opened.version
        with pytest.raises(DataError, match=r"verify\.options\.code\.languages"):
            opened.score(answer("1", "js"), INPUTS | {"language": "javascript"})
    finally:
        opened.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sandbox": "docker"}, "auto, bubblewrap"),
        ({"sandbox": "rlimits"}, "allow_rlimits_only"),
        ({"languages": "cobol"}, "verify.options.code.languages"),
        ({"time_limit_s": 0.0}, "verify.options.code.time_limit_s"),
        ({"total_s": float("inf")}, "verify.options.code.total_s"),
        ({"memory_bytes": 2**20}, "memory_bytes"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        CodeVerifier(**options)


def test_each_language_that_is_installed_solves_a_problem(verifier: CodeVerifier) -> None:
    solutions = {
        "python": "print(int(input()) ** 2)",
        "c": '#include <stdio.h>\nint main(void) { int n; scanf("%d", &n); printf("%d\\n", n * n); }',
        "cpp": "#include <iostream>\nint main() { int n; std::cin >> n; std::cout << n * n; }",
        "javascript": "console.log(Number(require('fs').readFileSync(0, 'utf8')) ** 2)",
        "java": "class Main { public static void main(String[] a) { "
        "int n = new java.util.Scanner(System.in).nextInt(); System.out.println(n * n); } }",
        "rust": "fn main() { let mut s = String::new(); std::io::stdin().read_line(&mut s).unwrap(); "
        'let n: i64 = s.trim().parse().unwrap(); println!("{}", n * n); }',
        "bash": "read n; echo $((n * n))",
    }
    assert set(solutions) == set(LANGUAGES)
    installed = [name for name in LANGUAGES if f"{name} " in verifier.version]
    assert {"python", "bash"} <= set(installed)
    for name in installed:
        assert accuracy(verifier, solutions[name], INPUTS | {"language": name}, name) == 1.0, name


def test_in_the_pool_programs_are_scored_and_their_data_is_judged() -> None:
    path = "treadle.actors.verify.programs.verifier:CodeVerifier"
    config = VerifyConfig(processes=1, deadline_s=30.0, custom={"programs": path}, parts={"accuracy": 1.0})

    async def main() -> None:
        async with asyncio.timeout(100), running(config) as pool:
            texts = [answer(RIGHT), answer(MOSTLY), answer("while True: pass"), "nothing"]
            verdicts = await judged(pool, *texts, verifier="programs", **CALLS)
            assert statuses(verdicts) == ["scored"] * 4
            assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 0.0, 0.0]
            assert "rlimits; python 3." in verdicts[0].verifier
            (verdict,) = await judged(pool, answer(RIGHT), verifier="programs", tests=3)
            assert statuses((verdict,)) == ["failed"]
            assert '"tests" is not a list' in verdict.detail

    asyncio.run(main())
