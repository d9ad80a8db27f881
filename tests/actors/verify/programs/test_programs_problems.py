"""Right programs pass and wrong ones fail, over a set of small problems in several languages."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from treadle.actors.verify.programs.languages import toolchain
from treadle.actors.verify.programs.verifier import CodeVerifier
from treadle.platform.errors import DataError

pytestmark = pytest.mark.processes

PROBLEMS: list[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("problems.toml").read_text())[
    "problem"
]


@pytest.fixture(scope="module")
def verifier() -> Iterator[CodeVerifier]:
    opened = CodeVerifier(time_limit_s=15.0, total_s=120.0)  # a crowded machine is no wrong answer
    yield opened
    opened.close()


def payload(problem: Mapping[str, Any]) -> dict[str, Any]:
    tests = [
        {"call": {"function": problem.get("function"), "args": args}, "returns": returns}
        for args, returns in problem.get("calls", [])
    ]
    tests += [{"stdin": stdin, "stdout": stdout} for stdin, stdout in problem.get("inputs", [])]
    kept = {key: problem[key] for key in ("language", "compare", "asserts", "entry_point") if key in problem}
    return kept | ({"tests": tests} if tests else {})


def score(verifier: CodeVerifier, problem: Mapping[str, Any], code: str) -> float:
    completion = f"<think>{problem['text']}</think>\nSo:\n\n```{problem['language']}\n{code}\n```\n"
    ((name, value),) = verifier.score(completion, payload(problem))
    assert name == "accuracy"
    return value


def test_there_are_enough_of_them_and_each_has_two_mutants() -> None:
    assert len(PROBLEMS) >= 25
    assert len({problem["id"] for problem in PROBLEMS}) == len(PROBLEMS)
    assert min(len(problem["mutants"]) for problem in PROBLEMS) >= 2
    assert len({problem["language"] for problem in PROBLEMS}) >= 5


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem["id"])
def test_the_solution_passes_and_every_mutant_fails(verifier: CodeVerifier, problem: dict[str, Any]) -> None:
    try:
        toolchain(problem["language"])
    except DataError as error:
        pytest.skip(error.message)
    scores = [score(verifier, problem, code) for code in (problem["solution"], *problem["mutants"])]
    assert scores == [1.0] + [0.0] * len(problem["mutants"])
