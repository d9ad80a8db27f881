"""A prompt's verifier and the format part, summed with the configured weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from treadle.actors.verify.answer import without_eos
from treadle.actors.verify.registry import make_verifier
from treadle.actors.verify.template import ROLE_MARKERS, FormatVerifier

if TYPE_CHECKING:
    from treadle.platform.contracts import Verifier
    from treadle.platform.records import Json

FORMAT = "format"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSpec:
    """What a process needs to know of the configuration; crosses to it as JSON."""

    parts: Mapping[str, float]
    eos: str
    think_opened: bool
    custom: Mapping[str, str]


class CompositeVerifier:
    """Scores one completion by several verifiers; `score` has the parts already weighted, so that they sum
    to the reward."""

    name = "composite"

    def __init__(self, verifiers: Sequence[Verifier], spec: ScoringSpec) -> None:
        self._verifiers = verifiers
        self._spec = spec
        self.version = "+".join(f"{verifier.name}/{verifier.version}" for verifier in verifiers)

    def score(
        self, completion: str, payload: Mapping[str, Json], finished: bool = True
    ) -> tuple[tuple[str, float], ...]:
        """Weighted parts. A completion that was cut off (`finished` false) gets no format credit.

        Raises `ValueError` for a part without a weight or with a value that is not finite.
        """
        body = without_eos(completion, self._spec.eos)
        weighted: list[tuple[str, float]] = []
        for verifier in self._verifiers:
            for part, value in verifier.score(body, payload):
                if part == FORMAT and not finished:
                    value = 0.0  # noqa: PLW2901  the verifier cannot know of the cut
                weighted.append((part, self._weight(part, value) * value))
        return tuple(weighted)

    def _weight(self, part: str, value: float) -> float:
        if part not in self._spec.parts:
            raise ValueError(f"The reward part {part!r} has no weight. Set verify.parts.{part}.")
        if not isfinite(value):
            raise ValueError(f"The reward part {part!r} is {value}.")
        return self._spec.parts[part]


def make_composite(name: str, spec: ScoringSpec) -> CompositeVerifier:
    """The verifier a prompt names, and the format part where it has a weight."""
    forbidden = (*ROLE_MARKERS, spec.eos) if spec.eos else ROLE_MARKERS
    template = FormatVerifier(opened=spec.think_opened, forbidden=forbidden)
    if name == FORMAT:
        return CompositeVerifier([template], spec)
    verifiers: list[Verifier] = [make_verifier(name, spec.custom)]
    if spec.parts.get(FORMAT, 0.0) != 0.0:
        verifiers.append(template)
    return CompositeVerifier(verifiers, spec)
