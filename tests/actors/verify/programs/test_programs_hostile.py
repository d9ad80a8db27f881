"""What a policy may write as a program. Nothing gets out, nothing stays, nothing wrong passes, and the judge has
its answer within the program's time and a second, in every tier that calls itself safe, as root and as nobody."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.actors.verify.as_nobody import passes_as_nobody
from tests.actors.verify.programs.attempts import ATTEMPTS, PRELUDE, Target, opened_target
from tests.actors.verify.programs.exhaustion import COMPILE_BOMBS, EXHAUSTIONS
from tests.actors.verify.programs.forgeries import FORGERIES, NODE_FORGERIES
from tests.actors.verify.programs.hostile_helpers import BUDGET, STRONG, assert_contained, judged

from treadle.actors.verify.programs.cases import CallTest, StdinTest, Test
from treadle.actors.verify.programs.languages import toolchain
from treadle.actors.verify.programs.local import LocalSandbox
from treadle.actors.verify.programs.records import SandboxError
from treadle.actors.verify.programs.tiers import make_local, probed
from treadle.platform.errors import DataError

pytestmark = pytest.mark.slow
NOBODY_S = 800.0
PATIENT = replace(BUDGET, time_limit_s=8.0)
"""For programs that end by themselves, also on a crowded machine."""
DAILY_EXHAUSTIONS = {
    *(
        "an endless loop",
        "sleeping",
        "ignoring every signal",
        "a fork bomb",
        "a fork bomb of sessions",
        "all memory",
    ),
    *(
        "memory of many processes",
        "a flood of output",
        "a flood of errors",
        "a large file",
        "the temporary folder",
    ),
}
"""Each takes its whole time: the others run in `make verify-hostile`."""
ANYTHING: list[Test] = [StdinTest(stdin="", stdout="")]


def daily(cases: Iterable[str], always: set[str]) -> list[object]:
    """Names of cases, of which `always` run in every test run."""
    assert always <= set(cases)
    return [pytest.param(name, marks=() if name in always else pytest.mark.hostile) for name in cases]


# Landlock runs daily too, but as nobody, who needs it most (the last test here).
TIERS = [STRONG[0], pytest.param(STRONG[1], marks=() if os.getuid() else pytest.mark.hostile)]


@pytest.fixture(scope="module", params=TIERS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[LocalSandbox]:
    try:
        opened = make_local(request.param)
    except SandboxError as error:
        pytest.skip(f"{request.param}: {error.message}")
    assert probed(opened, ()) == ""
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, list[str]]]:
    with opened_target(tmp_path_factory.mktemp("target")) as opened:
        yield opened


def needs(language: str) -> None:
    try:
        toolchain(language)
    except DataError as error:
        pytest.skip(error.message)


@pytest.mark.parametrize("name", ATTEMPTS)
def test_an_attempt_to_get_out_is_refused(
    sandbox: LocalSandbox, target: tuple[Target, list[str]], name: str
) -> None:
    there, reached = target
    tests: list[Test] = [StdinTest(stdin=there.stdin(), stdout="held")]
    seen = judged(sandbox, "python", PRELUDE + ATTEMPTS[name], tests, PATIENT)
    assert [result.passed for result in seen.results] == [True], seen.details
    assert reached == []
    assert not (Path(there.folder) / "written").exists()
    assert_contained(seen)


@pytest.mark.parametrize("name", daily(EXHAUSTIONS, DAILY_EXHAUSTIONS))
def test_what_uses_all_up_is_stopped_in_time(sandbox: LocalSandbox, name: str) -> None:
    case = EXHAUSTIONS[name]
    needs(case.language)
    tests: list[Test] = [StdinTest(stdin="", stdout="cannot be printed " + secrets.token_hex(8))]
    seen = judged(sandbox, case.language, case.code, tests)
    compiling_s = BUDGET.compile_limit_s if toolchain(case.language).language.compile else 0.0
    assert [result.passed for result in seen.results] == [False]
    assert not case.why or any(why in seen.details for why in case.why), seen.details
    assert_contained(seen, BUDGET.time_limit_s + compiling_s)
    # The next program finds an orderly place.
    after = judged(sandbox, "python", "print(1)", [StdinTest(stdin="", stdout="1")])
    assert [result.passed for result in after.results] == [True], after.details


@pytest.mark.parametrize("name", daily(COMPILE_BOMBS, {"including endless zeros", "templates that double"}))
def test_what_does_not_compile_is_stopped_in_time(sandbox: LocalSandbox, name: str) -> None:
    case = COMPILE_BOMBS[name]
    needs(case.language)
    seen = judged(sandbox, case.language, case.code, ANYTHING)
    assert [result.passed for result in seen.results] == [False]
    assert "does not compile" in seen.details
    assert_contained(seen, BUDGET.compile_limit_s)


def secret_sums() -> list[Test]:
    return [
        CallTest(function="secret_sum", args=(a, b), returns=a + b + secrets.randbelow(10**12) + 1000)
        for a, b in ((1, 2), (30, 4), (5, 600))
    ]


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_passes_nothing(sandbox: LocalSandbox, name: str) -> None:
    seen = judged(sandbox, "python", FORGERIES[name], secret_sums(), stop_at_failure=False)
    assert [result.passed for result in seen.results] == [False] * 3
    assert_contained(seen, BUDGET.total_s / 3)


@pytest.mark.parametrize("name", NODE_FORGERIES)
def test_a_forgery_in_javascript_passes_nothing(sandbox: LocalSandbox, name: str) -> None:
    needs("javascript")
    seen = judged(sandbox, "javascript", NODE_FORGERIES[name], secret_sums(), stop_at_failure=False)
    assert [result.passed for result in seen.results] == [False] * 3
    assert_contained(seen, BUDGET.total_s / 3)


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        ("print(1); raise SystemExit(1)", "1"),
        ("print(1, flush=True); import os; os.abort()", "1"),
        ("print('passed')", "1"),
        ("print(1); print(1)", "1"),
        ("import os; os.write(1, bytes([0xff, 0xfe]))", "\ufffd\ufffd"),
        ("import os; os.write(2, b'1')", "1"),
        ("print(1); import time; time.sleep(30)", "1"),
        ("print('\\0001')", "1"),
        ("print('\\u0661')", "1"),
        ("print('NaN')", "nan"),
    ],
)
def test_output_that_is_almost_right_is_wrong(sandbox: LocalSandbox, code: str, stdout: str) -> None:
    seen = judged(sandbox, "python", code, [StdinTest(stdin="", stdout=stdout)])
    assert [result.passed for result in seen.results] == [False]
    assert_contained(seen)


def test_a_right_program_that_leaves_a_daemon_passes_and_the_daemon_dies(sandbox: LocalSandbox) -> None:
    code = """
import os, time
print(7, flush=True)
if os.fork() == 0:
    try:
        os.setsid()
    except OSError:
        pass
    if os.fork() == 0:
        for fd in (0, 1, 2): os.close(fd)
        time.sleep(60)
    os._exit(0)
"""
    seen = judged(sandbox, "python", code, [StdinTest(stdin="", stdout="7")])
    assert [result.passed for result in seen.results] == [True], seen.details
    assert_contained(seen)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param("attempt or forgery or daemon", id="getting out and forging"),
        pytest.param(
            "not judge_without_rights", id="everything", marks=[pytest.mark.hostile, pytest.mark.timeout(900)]
        ),
    ],
)
def test_it_holds_for_a_judge_without_rights(chosen: str) -> None:
    """These tests and the sandbox's own: programs then run as nobody too."""
    passes_as_nobody("tests/actors/verify/programs", "test_programs_[hs]*.py", chosen, NOBODY_S)
