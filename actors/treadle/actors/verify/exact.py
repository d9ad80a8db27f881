"""`exact`: the answer is the expected string, up to Unicode form and spacing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from treadle.actors.verify.answer import answer_region, boxless, plain
from treadle.actors.verify.payload import text_field

if TYPE_CHECKING:
    from treadle.platform.records import Json


class ExactVerifier:
    """Payload: `answer` (text or integer), optional `ignore_case`.

    Example: payload `{"answer": "132"}`, completion `<think>…</think><answer> 132 </answer>`: accuracy 1.
    """

    name = "exact"
    version = "1"
    deterministic = True

    def score(self, completion: str, payload: Mapping[str, Json]) -> tuple[tuple[str, float], ...]:
        gold = plain(text_field(payload, "answer"))
        answer = plain(boxless(answer_region(completion)))
        if payload.get("ignore_case", False):
            gold, answer = gold.casefold(), answer.casefold()
        return (("accuracy", float(bool(answer) and answer == gold)),)
