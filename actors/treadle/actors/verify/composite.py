"""A prompt's verifier and the form parts, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING

from treadle.actors.verify.answer import without_eos
from treadle.actors.verify.registry import FORM, make_verifier
from treadle.actors.verify.template import ROLE_MARKERS

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
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


class CompositeVerifier:
    """Scores one completion by several verifiers, each of which adds parts."""

    name = "composite"

    def __init__(self, verifiers: Sequence[Verifier], spec: ScoringSpec) -> None:
        self._verifiers = verifiers
        self._spec = spec
        self.version = "+".join(f"{verifier.name}/{verifier.version}" for verifier in verifiers)
        self._logged = {part for verifier in verifiers for part in getattr(verifier, "logged_parts", ())}
        self.deterministic = all(getattr(verifier, "deterministic", False) for verifier in verifiers)

    def score(
        self, completion: str, payload: Mapping[str, Json], finished: bool = True
    ) -> tuple[tuple[str, float], ...]:
        """All parts, as the verifiers gave them. A completion that was cut off (`finished` false) gets no format
        credit.

        Raises `ValueError` for a part without a weight, one that two verifiers give, or a value that is not finite.
        """
        body = without_eos(completion, self._spec.eos)
        parts: dict[str, float] = {}
        for verifier in self._verifiers:
            for part, value in verifier.score(body, payload):
                if part in parts:
                    raise ValueError(f"Two verifiers give the reward part {part!r}.")
                self._check(part, value)
                parts[part] = 0.0 if part == FORMAT and not finished else value
        return tuple(parts.items())

    def _check(self, part: str, value: float) -> None:
        if part not in self._spec.parts and part not in self._logged:
            raise ValueError(f"The reward part {part!r} has no weight. Set verify.parts.{part}.")
        if not isfinite(value):
            raise ValueError(f"The reward part {part!r} is {value}.")


def make_composite(name: str, spec: ScoringSpec) -> CompositeVerifier:
    """The verifier a prompt names, and each form part that `verify.parts` lists."""
    beside = [part for part in FORM if part in spec.parts and part != name]
    return CompositeVerifier([_made(part, spec) for part in (name, *beside)], spec)


def _made(name: str, spec: ScoringSpec) -> Verifier:
    options = dict(spec.options.get(name, {}))
    if name == FORMAT:
        forbidden = (*ROLE_MARKERS, spec.eos) if spec.eos else ROLE_MARKERS
        options = {"opened": spec.think_opened, "forbidden": forbidden, **options}
    return make_verifier(name, spec.custom, options)
