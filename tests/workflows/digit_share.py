"""A verifier that random weights can please, so that the smallest runs have rewards to learn from."""

from __future__ import annotations

from collections.abc import Mapping

from treadle.platform.records import Json


class DigitShare:
    """The share of digits among the characters; right if it is more than half. `payload` is ignored."""

    name = "digit_share"
    version = "1"

    def score(self, completion: str, payload: Mapping[str, Json]) -> tuple[tuple[str, float], ...]:
        share = sum(c.isdigit() for c in completion) / max(1, len(completion))
        return (("accuracy", float(share > 0.5)), ("digits", share))
