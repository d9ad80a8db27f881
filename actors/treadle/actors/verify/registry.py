"""Verifiers by name, imported only when asked for: a process that checks strings must not pay for sympy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from treadle.platform.errors import ConfigError

if TYPE_CHECKING:
    from treadle.platform.contracts import Verifier

_HERE = "treadle.actors.verify"
VERIFIERS: Mapping[str, str] = {
    "exact": f"{_HERE}.exact:ExactVerifier",
    "numeric": f"{_HERE}.numeric:NumericVerifier",
    "countdown": f"{_HERE}.countdown:CountdownVerifier",
    "math": f"{_HERE}.symbolic:MathVerifier",
    "code": f"{_HERE}.programs.verifier:CodeVerifier",
    "judge": f"{_HERE}.judge_model:JudgeVerifier",
    "format": f"{_HERE}.template:FormatVerifier",
    "language": f"{_HERE}.language:LanguageVerifier",
    "repetition": f"{_HERE}.repetition:RepetitionVerifier",
    "reflection": f"{_HERE}.reflection:ReflectionVerifier",
}
"""Name in `Prompt.verifier` to `module:attribute`, a callable that makes the verifier from its options."""

FORM: tuple[str, ...] = ("format", "language", "repetition", "reflection")
"""Verifiers that look at a completion's form and not at its answer. Each returns one part, of its own name, and runs
on every completion where `verify.parts` lists it."""

FORKABLE = frozenset({"exact", "numeric", "countdown", "math", *FORM})
"""Verifiers that hold no process, thread or socket, so that a built one survives a fork. Those of users may."""

DEADLINES_S: Mapping[str, float] = {"code": 30.0, "judge": 30.0}
"""Deadlines of verifiers that compile, run or ask somebody; all others have `verify.deadline_s`."""

_TYPES: Mapping[str, type | tuple[type, ...]] = {"bool": bool, "int": int, "float": (int, float), "str": str}


def make_verifier(name: str, custom: Mapping[str, str], options: Mapping[str, object]) -> Verifier:
    """Builds the verifier of a name, its own ones (`custom`) included.

    Names come from data and paths and options from the configuration only, so data cannot choose what is imported.
    Raises `ConfigError` for an unknown name, a path that leads nowhere, or an option the verifier does not have.
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
    check_options(name, factory, options)
    verifier: Verifier = factory(**options)
    return verifier


def check_options(name: str, factory: Callable[..., object], options: Mapping[str, object]) -> None:
    """Raises `ConfigError` for an option that is not a keyword of the factory, or of another type than it says."""
    if not options:
        return
    keywords = {
        key: str(parameter.annotation)
        for key, parameter in inspect.signature(factory).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for key, value in options.items():
        if key not in keywords:
            known = f"Its options: {', '.join(keywords)}." if keywords else "It has no options."
            raise ConfigError(f"verify.options.{name}.{key} is not an option of {name}.", known)
        wanted = _TYPES.get(keywords[key])
        if wanted is not None and (
            not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool)
        ):
            raise ConfigError(
                f"verify.options.{name}.{key}={value!r} is not a {keywords[key]}.",
                "Give one, or leave it out.",
            )
