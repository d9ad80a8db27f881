"""What every `Verifier` promises, asked of each one by name. A new verifier is one line in `CASES`."""

import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from treadle.actors.verify.composite import ScoringSpec, make_composite
from treadle.actors.verify.registry import VERIFIERS, make_verifier
from treadle.platform.contracts import Verifier
from treadle.platform.errors import DataError
from treadle.platform.records import Json


@dataclass(frozen=True)
class Case:
    """A payload, an answer that earns everything, and one that earns nothing."""

    payload: Mapping[str, Json]
    right: str
    wrong: str
    broken_payload: Mapping[str, Json] | None = None


CASES = {
    "exact": Case({"answer": "132"}, "132", "133", {}),
    "numeric": Case({"answer": "0.5"}, "1/2", "0.51", {"answer": "half"}),
    "countdown": Case({"numbers": [3, 4, 5], "target": 35}, "(3+4)*5", "3+4+5", {"numbers": 3}),
    "math": Case({"answer": "\\sqrt{12}"}, "2\\sqrt{3}", "3\\sqrt{2}", {"answer": None}),
    "format": Case({}, "132", "132</answer><answer>132"),
    "code": Case(
        {"tests": [{"call": {"function": "f", "args": [2]}, "returns": 4}]},
        "```python\ndef f(x):\n    return x * x\n```",
        "```python\ndef f(x):\n    return x + 3\n```",
        {},
    ),
}


ELSEWHERE = {
    "judge": "test_judge_model.py",
    "language": "test_language.py",
    "repetition": "test_form_parts.py",
    "reflection": "test_form_parts.py",
}
"""Verifiers that need more than a payload (somebody to ask, a sandbox), or whose part is no accuracy, and the file that
tests them."""


@pytest.fixture(scope="module", params=sorted(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def verifier(name: str) -> Verifier:
    return make_verifier(name, {}, {})


def written(answer: str) -> str:
    return f"<think>because</think>\n<answer>{answer}</answer>"


def test_every_registered_verifier_is_tested_here() -> None:
    assert {*CASES, *ELSEWHERE} == set(VERIFIERS)
    assert all(
        (Path(__file__).parents[1] / "actors" / "verify" / file).is_file() for file in ELSEWHERE.values()
    )


def test_it_has_a_name_a_version_and_the_protocol(name: str, verifier: Verifier) -> None:
    assert isinstance(verifier, Verifier)
    assert verifier.name == name
    assert verifier.version


def test_right_earns_one_and_wrong_earns_zero(name: str, verifier: Verifier) -> None:
    case = CASES[name]
    for answer, expected in ((case.right, 1.0), (case.wrong, 0.0)):
        assert [value for _, value in verifier.score(written(answer), case.payload)] == [expected]


def test_scoring_is_pure(name: str, verifier: Verifier) -> None:
    case = CASES[name]
    before = json.dumps(case.payload)
    once = [verifier.score(written(answer), case.payload) for answer in (case.right, case.wrong)]
    again = [verifier.score(written(answer), case.payload) for answer in (case.right, case.wrong)]
    assert once == again
    assert json.dumps(case.payload) == before


def test_scores_are_finite_floats_that_survive_json_and_pickle(name: str, verifier: Verifier) -> None:
    parts = verifier.score(written(CASES[name].right), CASES[name].payload)
    assert all(type(value) is float and math.isfinite(value) for _, value in parts)
    assert json.loads(json.dumps(parts)) == [list(part) for part in parts]
    assert pickle.loads(pickle.dumps(parts)) == parts


def test_the_thinking_alone_earns_nothing(name: str, verifier: Verifier) -> None:
    case = CASES[name]
    text = f"<think>{case.right} \\boxed{{{case.right}}}</think><answer></answer>"
    assert [value for _, value in verifier.score(text, case.payload)] == [0.0]


@pytest.mark.parametrize("text", ["", " ", "<answer>", "</answer>", "<think>", "\x00", "\ud800", "\\boxed{"])
def test_odd_texts_earn_nothing_and_raise_nothing(name: str, verifier: Verifier, text: str) -> None:
    assert [value for _, value in verifier.score(text, CASES[name].payload)] == [0.0]


def test_a_broken_payload_raises_and_does_not_score(name: str, verifier: Verifier) -> None:
    payload = CASES[name].broken_payload
    if payload is None:
        assert verifier.score(written("1"), {}) == verifier.score(written("1"), {"unread": 1})
    else:
        with pytest.raises(DataError):
            verifier.score(written(CASES[name].right), payload)


def test_the_format_part_keeps_every_verifier_company(name: str) -> None:
    spec = ScoringSpec(parts={"accuracy": 2.0, "format": 0.5}, eos="<eos>", think_opened=False, custom={})
    composite = make_composite(name, spec)
    parts = composite.score(written(CASES[name].right) + "<eos>", CASES[name].payload)
    assert dict(parts) == ({"format": 1.0} if name == "format" else {"accuracy": 1.0, "format": 1.0})
    assert composite.version.count("/") == len(parts)
