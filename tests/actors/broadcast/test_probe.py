"""The probe: engines and learner must think the same."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from treadle.actors.broadcast.probe import Probe, probe_sequences
from treadle.platform.errors import BroadcastError, MismatchError
from treadle.platform.records import WeightVersion

VERSION = WeightVersion(step=12, digest="ab")
SEQUENCES = probe_sequences(vocab_size=40, count=3, tokens=8)


class UnigramScorer:
    """Scores tokens by a table of logits, shifted per holder."""

    def __init__(self, shifts: Mapping[str, float]) -> None:
        self.shifts = shifts

    async def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> Mapping[str, NDArray[np.float32]]:
        logits = np.linspace(-1, 1, 40)
        table = logits - np.log(np.exp(logits).sum())
        values = np.concatenate([table[s[1:]] for s in sequences]).astype(np.float32)
        return {
            name: values + np.float32(shift) * (np.arange(len(values)) == 5)
            for name, shift in self.shifts.items()
        }


def _probe(engines: Mapping[str, float], learner: Mapping[str, float] | None = None) -> Probe:
    ours = UnigramScorer({"learner": 0.0} if learner is None else learner)
    return Probe(rollouts=UnigramScorer(engines), learner=ours, sequences=SEQUENCES, limit=1e-3)


def test_equal_minds_differ_by_nothing() -> None:
    assert asyncio.run(_probe({"a": 0.0, "b": 1e-4}).compare(VERSION, ["a", "b"])) == pytest.approx(
        1e-4, rel=0.1
    )


def test_the_worst_engine_its_difference_and_the_version_are_named() -> None:
    with pytest.raises(
        MismatchError, match=r"engine b .*differ by 0\.5 nats .*limit 0.001.* version 12"
    ) as caught:
        asyncio.run(_probe({"a": 0.002, "b": 0.5}).compare(VERSION, ["a", "b"]))
    assert "broadcast.probe_limit" in str(caught.value)


@pytest.mark.parametrize("shift", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_a_mismatch(shift: float) -> None:
    with pytest.raises(MismatchError, match="engine a"):
        asyncio.run(_probe({"a": shift}).compare(VERSION, ["a"]))


def test_engines_left_behind_are_not_compared() -> None:
    assert asyncio.run(_probe({"a": 0.0, "behind": 3.0}).compare(VERSION, ["a"])) == 0.0


def test_a_probe_that_nobody_answers_is_an_error() -> None:
    with pytest.raises(BroadcastError, match="0 of the engines"):
        asyncio.run(_probe({"behind": 0.0}).compare(VERSION, ["a"]))
    with pytest.raises(BroadcastError, match="0 learner ranks"):
        asyncio.run(_probe({"a": 0.0}, learner={}).compare(VERSION, ["a"]))


def test_the_sequences_are_the_same_everywhere_and_within_the_vocabulary() -> None:
    again = probe_sequences(vocab_size=40, count=3, tokens=8)
    assert all(map(np.array_equal, SEQUENCES, again))
    assert [s.shape for s in SEQUENCES] == [(8,)] * 3
    assert 0 <= min(s.min() for s in SEQUENCES) <= max(s.max() for s in SEQUENCES) < 40
    assert not np.array_equal(SEQUENCES[0], SEQUENCES[1])
