"""Hostile texts through the real pool: each is judged in time, none is rewarded, and the pool judges on afterwards."""

import asyncio
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.actors.verify.as_nobody import passes_as_nobody
from tests.actors.verify.hostile_texts import COMPUTE, KINDS, TEXTS
from tests.actors.verify.pool_helpers import children, judged, running

from treadle.actors.verify import rational, strictness
from treadle.actors.verify.answer import as_latex, readable
from treadle.actors.verify.commitment import committed_answer
from treadle.actors.verify.config import VerifyConfig
from treadle.actors.verify.countdown import CountdownVerifier
from treadle.actors.verify.exact import ExactVerifier
from treadle.actors.verify.language import LanguageVerifier
from treadle.actors.verify.numeric import NumericVerifier
from treadle.actors.verify.reflection import ReflectionVerifier
from treadle.actors.verify.repetition import RepetitionVerifier
from treadle.actors.verify.strictness import MathRules
from treadle.actors.verify.template import FormatVerifier
from treadle.platform.contracts import Verifier
from treadle.platform.records import Json, Verdict

pytestmark = pytest.mark.processes

DEADLINE_S = 1.0
MOST_GROWTH_BYTES = 96 * 2**20
"""Of this process over all texts of one run: the longest text is a megabyte, and nothing of it may stay."""
RELAXED: dict[str, Json] = {
    "allow_unevaluated": True,
    "allow_chains": True,
    "allow_alternatives": True,
    "allow_set_for_tuple": True,
    "allow_missing_base": True,
    "percent": "either",
}
PAYLOADS: dict[str, dict[str, Json]] = {
    "math": {"answer": "132"},
    "exact": {"answer": "132"},
    "numeric": {"answer": "132"},
    "countdown": {"numbers": [11, 12], "target": 132},
    "format": {},
}
ENDLESS = sorted(
    {f"compute: {name}" for name in COMPUTE}
    - {
        "compute: tower",
        "compute: tower of powers",
        "compute: modulus of a tower",
        "compute: factorial of a power",
        "compute: equation of high degree",
    }
)
"""What math-verify is still busy with after seconds. The others it gives up by itself."""
PARSED = [name for name in TEXTS if name.partition(":")[0] in ("compute", "deep", "code", "regex")]


@dataclass(frozen=True)
class Run:
    """What became of each text, by name, and of this process."""

    verdicts: dict[str, Verdict]
    waits_s: dict[str, float]
    judged_after: dict[str, bool]
    growth_bytes: int


def judge_each(verifier: str, payload: dict[str, Json], names: Sequence[str], deadline_s: float) -> Run:
    """Judges each text alone, and an honest answer after each: when that is there, a process that was killed has been
    replaced, so that the next text's time is its own."""
    honest_verifier = "math" if verifier == "math" else "exact"

    async def main() -> Run:
        config = VerifyConfig(
            processes=2, max_processes=2, deadline_s=deadline_s, warm=[verifier, honest_verifier]
        )
        verdicts, waits_s, judged_after = {}, {}, {}
        before = resident_bytes()
        async with asyncio.timeout(240), running(config) as pool:
            for number, name in enumerate(names):
                began = time.monotonic()
                text = f"<think>t</think><answer>{TEXTS[name]}</answer>"
                (verdicts[name],) = await judged(pool, text, verifier=verifier, **payload)
                waits_s[name] = time.monotonic() - began
                (honest,) = await judged(pool, str(number), verifier=honest_verifier, answer=str(number))
                judged_after[name] = dict(honest.parts)["accuracy"] == 1.0
        return Run(verdicts, waits_s, judged_after, resident_bytes() - before)

    return asyncio.run(main())


def resident_bytes() -> int:
    return int(psutil.Process(os.getpid()).memory_info().rss)


@pytest.fixture(scope="module")
def strict() -> Run:
    """As a run is by default. The deadline leaves room for a busy machine: nothing is expected to reach it."""
    return judge_each("math", PAYLOADS["math"], list(TEXTS), 4 * DEADLINE_S)


@pytest.fixture(scope="module")
def relaxed() -> Run:
    """With all rules off, so that the texts reach the parser."""
    return judge_each("math", {"answer": "\\sqrt{132}", **RELAXED}, PARSED, DEADLINE_S)


@pytest.mark.parametrize("name", list(TEXTS))
def test_by_default_it_is_judged_wrong_at_once(strict: Run, name: str) -> None:
    verdict = strict.verdicts[name]
    assert (verdict.status.value, dict(verdict.parts).get("accuracy")) == ("scored", 0.0)
    assert strict.judged_after[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSED)
def test_in_the_parser_it_is_wrong_or_killed_in_time(relaxed: Run, name: str) -> None:
    verdict = relaxed.verdicts[name]
    assert (
        verdict.status.value == "timed_out"
        if name in ENDLESS
        else verdict.status.value in ("scored", "timed_out")
    )
    assert dict(verdict.parts).get("accuracy", 0.0) == 0.0
    assert relaxed.waits_s[name] <= DEADLINE_S + 1.0
    assert relaxed.judged_after[name]


@pytest.mark.slow
def test_killing_leaves_no_memory_and_no_process_behind(relaxed: Run) -> None:
    assert relaxed.growth_bytes < MOST_GROWTH_BYTES
    assert children() == []


@pytest.mark.parametrize("verifier", ["exact", "numeric", "countdown", "format"])
def test_verifiers_without_a_parser_judge_every_text_wrong_at_once(verifier: str) -> None:
    run = judge_each(verifier, PAYLOADS[verifier], list(TEXTS), 4 * DEADLINE_S)
    assert {verdict.status.value for verdict in run.verdicts.values()} == {"scored"}
    part = "format" if verifier == "format" else "accuracy"
    rewarded = {name for name, verdict in run.verdicts.items() if dict(verdict.parts)[part] != 0.0}
    assert rewarded == EXPECTED[verifier]
    assert all(run.judged_after.values())
    assert run.growth_bytes < MOST_GROWTH_BYTES
    assert max(run.waits_s.values()) < DEADLINE_S + 1.0


EXPECTED: dict[str, set[str]] = {
    "exact": set(),
    "numeric": {"hedge: division"},  # a fraction is a number, reduced or not
    "countdown": set(),
    "format": {name for name, text in TEXTS.items() if "think>" not in text and "answer>" not in text},
}


def test_every_kind_of_text_is_there() -> None:
    assert len(TEXTS) >= 120
    assert all(len(texts) >= 15 for texts in KINDS.values())


PIECES = [
    *(
        "\\boxed{",
        "\\frac{1}{",
        "\\sqrt{",
        "\\left(",
        "\\right)",
        "}",
        "{",
        "(",
        ")",
        "[",
        "]",
        "\\{",
        "\\}",
        "$",
        "\\(",
        "\\)",
    ),
    *(
        "9**9",
        "^{9",
        "!",
        "=",
        ",",
        ";",
        "+",
        "-",
        "\\cdot ",
        "\\%",
        "%",
        "_2",
        "\\text{",
        " or ",
        " and ",
        "\\pm",
        "\\to ",
    ),
    *(
        "1",
        "0",
        "x",
        "e5",
        "1e99",
        "\\infty",
        "\\sum_{k=1}^{9}",
        "\\int",
        "\\\\",
        "&",
        "\\begin{pmatrix}",
        "\\end{pmatrix}",
    ),
    *("\x00", "\ud800", "\u200b", "\u202e", "\u0300", "١", "１", "²", "√", "½", "\n", "\t", " ", "\x1b[2J"),
    *(
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "answer is ",
        "__import__('os')",
        "```",
        "`",
        "http://",
        "字",
        "か",
    ),
]
FUZZED: list[Verifier] = [
    *(
        ExactVerifier(),
        NumericVerifier(),
        FormatVerifier(),
        FormatVerifier(answer_tags=False),
        CountdownVerifier(),
    ),
    *(LanguageVerifier(target="en"), RepetitionVerifier(n=2), ReflectionVerifier()),
]


@settings(deadline=2000, max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_nothing_made_of_these_pieces_raises_in_a_verifier_without_a_parser(pieces: list[str]) -> None:
    text = "".join(pieces)
    payload: dict[str, Json] = {"answer": "132", "numbers": [11, 12], "target": 132}
    for verifier in FUZZED:
        ((_, value),) = verifier.score(text, payload)
        assert 0.0 <= value <= (100.0 if verifier.name == "reflection" else 1.0)


@settings(deadline=2000, max_examples=300)
@given(
    st.lists(st.sampled_from(PIECES), max_size=40),
    st.sampled_from(["132", "(1,2)", "x=5", "\\frac{n}{2}", "101_2"]),
)
def test_nothing_made_of_these_pieces_raises_before_the_parser(pieces: list[str], gold: str) -> None:
    answer = as_latex(readable(committed_answer("".join(pieces))))
    rational.read_measure(answer)
    strictness.refused(gold, answer, MathRules())
    strictness.same_numeral(gold, answer, False)
    strictness.chains(answer)
    for percent in strictness.PERCENT:
        strictness.with_percent(answer, percent)


def test_random_texts_in_the_parser_are_wrong_or_killed() -> None:
    """Through the pool, because what they do to the parser is not known beforehand."""
    rng = random.Random(17)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(150)]

    async def main() -> tuple[Verdict, ...]:
        config = VerifyConfig(processes=2, max_processes=2, deadline_s=DEADLINE_S, warm=["math"])
        async with asyncio.timeout(120), running(config) as pool:
            return await judged(pool, *texts, verifier="math", answer="\\sqrt{132}", **RELAXED)

    verdicts = asyncio.run(main())
    assert {verdict.status.value for verdict in verdicts} <= {"scored", "timed_out"}
    assert all(dict(verdict.parts).get("accuracy", 0.0) == 0.0 for verdict in verdicts)
    assert sum(verdict.status.value == "scored" for verdict in verdicts) > 100


@pytest.mark.hostile
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_it_holds_for_a_judge_without_rights() -> None:
    passes_as_nobody("tests/actors/verify", "test_hostile_text.py", "not judge_without_rights", 500.0)
