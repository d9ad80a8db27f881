"""`numeric`: the answer is the expected number, compared exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from treadle.actors.verify import rational
from treadle.actors.verify.answer import answer_region, boxless
from treadle.actors.verify.payload import choice, non_negative, text_field
from treadle.platform.errors import DataError

if TYPE_CHECKING:
    from treadle.platform.records import Json


class NumericVerifier:
    """Payload: `answer`; optional `abs_tol`, `rel_tol` (the larger bound holds) and `percent`: `divide`
    (`50%` equals `0.5`, the default) or `ignore` (`50%` equals `50`).

    Example: payload `{"answer": "0.5"}` accepts `1/2`, `50%`, `5e-1`, `0.50`, and not `0.500001`.
    """

    name = "numeric"
    version = "1"
    deterministic = True

    def score(self, completion: str, payload: Mapping[str, Json]) -> tuple[tuple[str, float], ...]:
        percent = choice(payload, "percent", ("divide", "ignore"))
        text = text_field(payload, "answer")
        gold = rational.read(text, percent)
        if gold is None:
            raise DataError(
                f"The expected answer {text[:80]!r} is not a number.", "Use the verifier exact or math."
            )
        answer = rational.read(boxless(answer_region(completion)), percent)
        absolute, relative = non_negative(payload, "abs_tol"), non_negative(payload, "rel_tol")
        right = answer is not None and rational.close(answer, gold, absolute, relative)
        return (("accuracy", float(right)),)
