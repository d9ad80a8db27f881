"""The probe: do engine and learner think the same about the same tokens?

Equal digests prove that the bytes arrived; only log-probabilities prove that the engine computes with them as
the learner does. A wrong mask, a missing bias or a tied head that was not re-tied pass every checksum.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treadle.platform.contracts import Scorer
from treadle.platform.errors import BroadcastError, MismatchError
from treadle.platform.records import WeightVersion
from treadle.platform.seeds import derive_seed


def probe_sequences(vocab_size: int, count: int, tokens: int) -> tuple[NDArray[np.int32], ...]:
    """`count` fixed sequences of `tokens` random token ids each; the same in every process and run."""
    rng = np.random.Generator(np.random.Philox(key=derive_seed("probe", vocab_size, count, tokens)))
    return tuple(rng.integers(0, vocab_size, size=tokens, dtype=np.int32) for _ in range(count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Compares engines with the learner on fixed sequences.

    `limit` is the largest difference allowed of one token's log-probability, in nats.
    """

    rollouts: Scorer
    learner: Scorer
    sequences: tuple[NDArray[np.int32], ...]
    limit: float

    async def compare(self, version: WeightVersion, engines: Collection[str]) -> float:
        """The largest difference over all `engines` and tokens, in nats.

        Raises `MismatchError` naming the worst engine when it is above the limit or not a number, and
        `BroadcastError` when no engine or no learner answered.
        """
        ours, theirs = await asyncio.gather(
            self.learner.logprobs(self.sequences), self.rollouts.logprobs(self.sequences)
        )
        answers = {name: values for name, values in theirs.items() if name in engines}
        if not ours or not answers:
            raise BroadcastError(
                f"broadcast.probe: version {version.step}: {len(ours)} learner ranks and {len(answers)} of "
                f"the engines {sorted(engines)} answered.",
                "At least one of each must answer; look at their logs.",
            )
        expected = next(iter(ours.values()))
        differences = {name: _difference(values, expected) for name, values in answers.items()}
        worst = max(differences, key=lambda name: differences[name])
        if differences[worst] > self.limit:
            raise MismatchError(
                f"broadcast.probe: engine {worst} and the learner differ by {differences[worst]:.3g} nats "
                f"(limit {self.limit:g}) on version {version.step}, digest {version.digest}.",
                "The bytes are equal, the computation is not: compare dtype, attention and tied embeddings, "
                "or raise broadcast.probe_limit (bf16 needs about 0.1).",
            )
        return differences[worst]


def _difference(values: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest difference; infinite where shapes differ or anything is not a finite number."""
    if values.shape != expected.shape:
        return float("inf")
    difference = np.abs(values.astype(np.float64) - expected.astype(np.float64))
    return float(difference.max(initial=0.0)) if np.isfinite(difference).all() else float("inf")
