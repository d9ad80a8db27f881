"""Candidate tests are kept where right programs pass and wrong ones do not."""

from __future__ import annotations

import pytest

from treadle.actors.verify.programs.cases import CallTest
from treadle.actors.verify.programs.languages import toolchain
from treadle.actors.verify.programs.quality import filter_tests, measure_tests
from treadle.actors.verify.programs.tiers import Choice, open_local
from treadle.platform.errors import DataError

T, F = True, False


def test_kept_is_what_all_right_ones_pass_and_a_wrong_one_fails() -> None:
    report = filter_tests(correct=[[T, T, F, T], [T, T, T, T]], wrong=[[F, T, F, T], [T, T, F, F]])
    assert [test.verdict for test in report.tests] == [
        "kept",
        "kills nothing",
        "refuses correct programs",
        "kept",
    ]
    assert report.kept == (0, 3)
    assert [test.kills for test in report.tests] == [(0,), (), (0, 1), (1,)]
    assert report.tests[2].failed_by == (0,)
    assert report.survivors == ()
    assert report.agreement == 1.0
    assert report.usable


def test_wrong_ones_that_pass_all_that_is_kept_are_named() -> None:
    report = filter_tests(correct=[[T, T]], wrong=[[F, T], [T, T]])
    assert report.kept == (0,)
    assert report.survivors == (1,)


def test_with_less_agreement_a_test_may_lose_some_right_ones() -> None:
    correct = [[T, T]] * 7 + [[F, T]] * 3
    wrong = [[F, F]]
    assert filter_tests(correct, wrong).kept == (1,)
    loose = filter_tests(correct, wrong, agreement=0.7)
    assert loose.kept == (0, 1)
    assert loose.agreement == 0.7
    assert not loose.usable
    assert filter_tests(correct, wrong, agreement=0.7, problem_agreement=0.7).usable
    assert filter_tests(correct, wrong, agreement=0.71).kept == (1,)


def test_without_wrong_ones_nothing_is_kept() -> None:
    report = filter_tests(correct=[[T, T]], wrong=[])
    assert report.kept == ()
    assert not report.usable


def test_results_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(DataError, match="without a correct submission"):
        filter_tests([], [[T]])
    with pytest.raises(DataError, match=r"\[1, 2\] tests"):
        filter_tests([[T]], [[T, T]])


def test_programs_are_run_to_find_out() -> None:
    tests = [
        CallTest(function="absolute", args=(n,), returns=r) for n, r in ((2, 2), (0, 0), (-3, 3), (-1, -1))
    ]
    correct = ["def absolute(n): return abs(n)", "def absolute(n): return n if n > 0 else -n"]
    wrong = ["def absolute(n): return n", "def absolute(n): return -n", "def absolute(n): return 1 / 0"]
    sandbox = open_local(Choice())
    try:
        report = measure_tests(sandbox, toolchain("python"), tests, correct, wrong)
    finally:
        sandbox.close()
    assert [test.verdict for test in report.tests] == ["kept", "kept", "kept", "refuses correct programs"]
    assert [test.kills for test in report.tests] == [(1, 2), (2,), (0, 2), (1, 2)]
    assert report.survivors == ()
