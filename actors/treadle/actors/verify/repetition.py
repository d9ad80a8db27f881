"""`repetition`: how much of a completion says again what it has said, as a penalty (give it a negative weight).

The share of n-grams that are not new, 1 - distinct / all, as in open-r1's `get_repetition_penalty_reward`. Deviation:
n is 20 and not 3. Three words recur in every long derivation, so that short n punishes length; a loop repeats any n.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from treadle.actors.verify.words import words
from treadle.platform.errors import ConfigError

if TYPE_CHECKING:
    from treadle.platform.records import Json

_PRIME = (1 << 61) - 1
_BASE = 1_000_003


class RepetitionVerifier:
    """Part `repetition`, 0 to 1; reads the whole completion and nothing of the payload. `n` is in words (see `words`);
    a completion with fewer words repeats nothing.

    Example: `RepetitionVerifier(n=2).score("so it is so it is so it is", {})` is `(("repetition", 0.625),)`: of 8
    pairs 3 are distinct.
    """

    name = "repetition"
    deterministic = True

    def __init__(self, *, n: int = 20) -> None:
        if n < 1:
            raise ConfigError(f"verify.options.repetition.n={n} must be at least 1.")
        self._n = n
        self.version = f"1 (n={n})"

    def score(self, completion: str, payload: Mapping[str, Json]) -> tuple[tuple[str, float], ...]:  # noqa: ARG002  the form does not depend on the task
        numbers: dict[str, int] = {}
        spoken = [numbers.setdefault(word.casefold(), len(numbers) + 1) for word in words(completion)]
        total = len(spoken) - self._n + 1
        if total < 1:
            return (("repetition", 0.0),)
        return (("repetition", 1.0 - len(set(_hashes(spoken, self._n))) / total),)


def _hashes(numbers: Sequence[int], n: int) -> Iterator[int]:
    """One number per n-gram, by a rolling polynomial modulo 2^61-1: tuples would take n times the memory."""
    leading = pow(_BASE, n - 1, _PRIME)
    rolled = 0
    for index, number in enumerate(numbers):
        if index >= n:
            rolled -= numbers[index - n] * leading
        rolled = (rolled * _BASE + number) % _PRIME
        if index >= n - 1:
            yield rolled
