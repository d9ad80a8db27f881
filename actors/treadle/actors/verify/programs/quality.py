"""Which candidate tests of a problem are worth having.

R1 filters generated tests in two phases: correct submissions rule out invalid tests, wrong ones select the
tests that find faults (Nature 2025, supplement on code data). Kimi k1.5 takes a test for valid where 7 of 10
submissions agree on it, and a problem where 9 of 10 pass all its tests (2501.12599, section 2.3.4). Both are
`agreement` and `problem_agreement` here; tests that no wrong submission fails are noise in either case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.actors.verify.programs.cases import Test
from treadle.actors.verify.programs.languages import Toolchain
from treadle.actors.verify.programs.records import Sandbox
from treadle.actors.verify.programs.submission import Budget, Submission
from treadle.platform.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class TestReport:
    """One candidate test. `failed_by` are correct submissions that fail it, `kills` wrong ones that do, as
    indices."""

    failed_by: tuple[int, ...]
    kills: tuple[int, ...]
    kept: bool

    @property
    def verdict(self) -> str:
        """`kept`, `refuses correct programs` or `kills nothing`."""
        if self.kept:
            return "kept"
        return "kills nothing" if not self.kills else "refuses correct programs"


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityReport:
    """`survivors` are wrong submissions that pass every kept test; `agreement` is the share of correct ones
    that do. `usable`: something is kept, and enough correct submissions pass it all.

    Example: `filter_tests([[True, True]], [[True, False]]).kept` is `(1,)`.
    """

    tests: tuple[TestReport, ...]
    kept: tuple[int, ...]
    survivors: tuple[int, ...]
    agreement: float
    usable: bool


def filter_tests(
    correct: Sequence[Sequence[bool]],
    wrong: Sequence[Sequence[bool]],
    agreement: float = 1.0,
    problem_agreement: float = 0.9,
) -> QualityReport:
    """Judges tests by who passes them: `correct[i][t]` and `wrong[j][t]` say whether submission i or j passes
    test t. Kept is what a share of at least `agreement` of the correct ones passes and a wrong one fails.

    Raises `DataError` without correct submissions, and for rows of unequal length.
    """
    if not correct:
        raise DataError(
            "Tests cannot be filtered without a correct submission.", "Give at least one known to be right."
        )
    lengths = {len(row) for row in (*correct, *wrong)}
    if len(lengths) != 1:
        raise DataError(
            f"Submissions have results for {sorted(lengths)} tests.", "Run all on the same tests."
        )
    reports = []
    for test in range(lengths.pop()):
        failed_by = tuple(index for index, row in enumerate(correct) if not row[test])
        kills = tuple(index for index, row in enumerate(wrong) if not row[test])
        valid = len(correct) - len(failed_by) >= agreement * len(correct)
        reports.append(TestReport(failed_by=failed_by, kills=kills, kept=valid and bool(kills)))
    kept = tuple(index for index, report in enumerate(reports) if report.kept)
    passing = sum(all(row[test] for test in kept) for row in correct)
    return QualityReport(
        tests=tuple(reports),
        kept=kept,
        survivors=tuple(index for index, row in enumerate(wrong) if all(row[test] for test in kept)),
        agreement=passing / len(correct),
        usable=bool(kept) and passing >= problem_agreement * len(correct),
    )


def measure_tests(
    sandbox: Sandbox,
    toolchain: Toolchain,
    tests: Sequence[Test],
    correct: Sequence[str],
    wrong: Sequence[str],
    budget: Budget | None = None,
    agreement: float = 1.0,
    problem_agreement: float = 0.9,
) -> QualityReport:
    """Runs every submission (source text) on every test, then `filter_tests`. The budget's `total_s` holds
    per submission; time it leaves no room for counts as failing. Raises `SandboxError`."""

    def passes(code: str) -> list[bool]:
        submission = Submission(sandbox, toolchain, code, budget or Budget(total_s=120.0))
        return [result.passed for result in submission.results(tests, stop_at_failure=False)]

    return filter_tests(
        [passes(code) for code in correct],
        [passes(code) for code in wrong],
        agreement=agreement,
        problem_agreement=problem_agreement,
    )
