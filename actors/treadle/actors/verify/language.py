"""`language`: how much of the thinking is written in the wanted language (DeepSeek-R1, arXiv 2501.12948, section 2.3).

Deviations and limits:
- Told by script, so that it is exact, fast and needs no model. Languages that share a script cannot be told apart:
  `en`, `fr`, `es` and `de` all accept any Latin text. Kanji count for `ja` as Han does for `zh`, so Chinese text passes
  for Japanese; Japanese passes for `zh` only in its kanji.
- The paper does not say what a word of Chinese is; here it is a character (see `words`). Korean has spaces, so its
  words are runs.
- The paper's share of nothing is undefined. A thinking of formulas alone gets `neutral`: 1 would pay for avoiding
  words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from treadle.actors.verify.words import thinking, words_per_script
from treadle.platform.errors import ConfigError, DataError

if TYPE_CHECKING:
    from treadle.platform.records import Json

SCRIPTS: Mapping[str, frozenset[str]] = {
    "en": frozenset({"latin"}),
    "fr": frozenset({"latin"}),
    "es": frozenset({"latin"}),
    "de": frozenset({"latin"}),
    "zh": frozenset({"han"}),
    "ja": frozenset({"han", "kana"}),
    "ko": frozenset({"hangul"}),
    "ru": frozenset({"cyrillic"}),
    "ar": frozenset({"arabic"}),
}
"""Language to the scripts that its words may have."""


class LanguageVerifier:
    """Part `language`, 0 to 1: words of the target language per word of the thinking; needs no `answer`.

    The target is the payload's `language`, else the option `target`; where the former is none of `SCRIPTS` it is meant
    for another verifier (`code` is told its programming language by the same name). `neutral` is the value where the
    thinking has no words. Raises `DataError` where neither names a target.

    Example: `LanguageVerifier(target="en").score("<think>so 所以 it is 5</think>5", {})` is `(("language", 0.6),)`.
    """

    name = "language"
    version = "1"
    deterministic = True

    def __init__(self, *, target: str = "", neutral: float = 0.5) -> None:
        if target and target not in SCRIPTS:
            raise ConfigError(f"verify.options.language.target={target!r} is unknown.", _known())
        if not 0 <= neutral <= 1:
            raise ConfigError(f"verify.options.language.neutral={neutral} is not between 0 and 1.")
        self._target = target
        self._neutral = float(neutral)
        self.version = f"1 (target={target or 'payload'}, neutral={self._neutral})"

    def score(self, completion: str, payload: Mapping[str, Json]) -> tuple[tuple[str, float], ...]:
        named = payload.get("language")
        target = named if isinstance(named, str) and named in SCRIPTS else self._target
        if not target:
            raise DataError(
                f"The part language has no target it knows: {str(named)[:80]!r}.",
                f'Set verify.options.language.target, or "language" in the payload. {_known()}',
            )
        return (("language", self.share(completion, target)),)

    def share(self, completion: str, target: str) -> float:
        """Share of the thinking's words that have a script of the target."""
        counts = words_per_script(thinking(completion))
        total = counts.total()
        return sum(counts[script] for script in SCRIPTS[target]) / total if total else self._neutral


def _known() -> str:
    return f"Use one of {', '.join(SCRIPTS)}."
