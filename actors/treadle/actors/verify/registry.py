"""Verifiers by name, imported only when asked for: a process that checks strings must not pay for sympy."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from treadle.platform.errors import ConfigError

if TYPE_CHECKING:
    from treadle.platform.contracts import Verifier

VERIFIERS: Mapping[str, str] = {
    "exact": "treadle.actors.verify.exact:ExactVerifier",
    "numeric": "treadle.actors.verify.numeric:NumericVerifier",
    "countdown": "treadle.actors.verify.countdown:CountdownVerifier",
    "math": "treadle.actors.verify.symbolic:MathVerifier",
    "format": "treadle.actors.verify.template:FormatVerifier",
}
"""Name in `Prompt.verifier` to `module:attribute`, a callable that makes the verifier."""


def make_verifier(name: str, custom: Mapping[str, str]) -> Verifier:
    """Builds the verifier of a name, its own ones (`custom`) included.

    Names come from data and paths from the configuration only, so data cannot choose what is imported.
    Raises `ConfigError` for an unknown name or a path that leads nowhere.
    """
    path = {**custom, **VERIFIERS}.get(name)
    if path is None:
        raise ConfigError(
            f"There is no verifier {name!r}.",
            f"Use one of {', '.join(sorted({*VERIFIERS, *custom}))}, or add it under verify.custom.",
        )
    module, _, attribute = path.partition(":")
    try:
        factory = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"The verifier {name!r} ({path}) cannot be imported: {error}.") from error
    verifier: Verifier = factory()
    return verifier
