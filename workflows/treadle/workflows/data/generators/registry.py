"""The generators by name: `generator.kind` in a recipe. Adding one is a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treadle.platform.config import variant, variants
from treadle.workflows.data.generators.addition import Addition
from treadle.workflows.data.generators.base import Generator
from treadle.workflows.data.generators.chains import Chain
from treadle.workflows.data.generators.conversion import Conversion
from treadle.workflows.data.generators.countdown import Countdown
from treadle.workflows.data.generators.multiplication import Multiplication
from treadle.workflows.data.generators.sorting import Sorting

GENERATORS: Mapping[str, type[Generator]] = {
    "addition": Addition,
    "chain": Chain,
    "multiplication": Multiplication,
    "countdown": Countdown,
    "conversion": Conversion,
    "sorting": Sorting,
}
variants("generator", GENERATORS)


def generator_field() -> Any:
    """A configuration field that holds one generator, two-digit addition unless the recipe says otherwise."""
    return variant("generator", kind="addition")
