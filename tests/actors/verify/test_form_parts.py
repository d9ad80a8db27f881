"""Repetition and reflection, the parts that look at a completion's form."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.actors.verify.reflection import ReflectionVerifier
from treadle.actors.verify.repetition import RepetitionVerifier
from treadle.platform.errors import ConfigError


def repetition(text: str, n: int = 20) -> float:
    ((name, value),) = RepetitionVerifier(n=n).score(text, {})
    assert name == "repetition"
    return value


def reflection(text: str) -> float:
    ((name, value),) = ReflectionVerifier().score(text, {})
    assert name == "reflection"
    return value


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("so it is so it is so it is", 2, 0.625),
        ("So it IS so it is", 3, 0.25),
        ("one two three four", 2, 0.0),
        ("one two", 3, 0.0),
        ("", 1, 0.0),
        ("no " * 30, 20, 1 - 1 / 11),
        ("对对对对", 2, 1 - 1 / 3),
        ("a b $c d$ 1 2", 1, 0.0),
    ],
)
def test_repetition_is_the_share_of_n_grams_that_are_not_new(text: str, n: int, expected: float) -> None:
    assert repetition(text, n) == pytest.approx(expected)


def test_a_loop_is_repetition_and_a_derivation_is_not() -> None:
    loop = "Let me check that again, because I am not sure. " * 40
    derivation = " ".join(
        f"step{'abcdefghij'[i % 10]} we add term{'klmnopqrst'[i // 10]} and so" for i in range(100)
    )
    assert repetition(loop) > 0.9
    assert repetition(derivation) == 0.0


@given(st.lists(st.sampled_from(["on", "to", "so", "字"]), max_size=40), st.integers(1, 6))
def test_rolled_n_grams_are_counted_as_written_out_ones(spoken: list[str], n: int) -> None:
    grams = [tuple(spoken[i : i + n]) for i in range(len(spoken) - n + 1)]
    expected = 1 - len(set(grams)) / len(grams) if grams else 0.0
    assert repetition(" ".join(spoken), n) == pytest.approx(expected)


def test_repetition_needs_a_length() -> None:
    with pytest.raises(ConfigError, match="n=0"):
        RepetitionVerifier(n=0)
    assert "n=4" in RepetitionVerifier(n=4).version


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>It is 5. Wait, let me double-check that.</think>5", 25.0),
        ("<think>Wait</think>however but wrong", 100.0),
        ("<think>We await butter, errorless.</think>", 0.0),
        ("<think>$wait$ so</think>", 0.0),
        ("<think>WAIT what</think>", 50.0),
        ("<think>re-verify it now please</think>", 20.0),
        ("<think>等等，我再验证。</think>", 100 * 2 / 6),
        ("<think>1+1</think>", 0.0),
        ("", 0.0),
    ],
)
def test_reflection_words_are_counted_per_hundred(text: str, expected: float) -> None:
    assert reflection(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "piece", ["wait ", "w", "等", "re-", "double-", "check\n", "字", "\\[", "$", "a\u0316\u0300"]
)
def test_a_megabyte_takes_a_moment(piece: str) -> None:
    began = time.process_time()
    repetition(piece * (2**18 // len(piece)))
    reflection(piece * (2**18 // len(piece)))
    assert time.process_time() - began < 2.0
