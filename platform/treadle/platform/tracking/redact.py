"""Keeps secrets out of everything that is written down: spool, MLflow, console, report.

Three independent nets: the name of a setting (`auth_token`, `aws_secret_access_key`), the values of this
process's secret environment variables wherever they turn up, and the shapes of well-known credentials.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from treadle.platform.records import Json

REDACTED = "[redacted]"
MIN_SECRET_CHARS = 8
"""Shorter environment values are ordinary words too often to be replaced everywhere."""

_SEGMENT = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_ALWAYS = ("password", "passwd", "passphrase", "secret", "credential", "apikey", "accesskey", "privatekey")
_POINTERS = ("file", "path", "dir", "mode")
"""Endings of names that say where a secret lies, or how it is used, not what it is."""

_PLAIN: tuple[Json, ...] = ("", "True", "False", "None", "true", "false", "null", [], {})

_SHAPES = re.compile(
    r"""
      \b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-)[A-Za-z0-9_-]{16,}
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b
    | \beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*
    | (?<=Bearer\ )[\w.~+/=-]{8,}
    | (?<=://)[^/\s@'"]+(?=@)
    """,
    re.VERBOSE,
)
_ASSIGNMENT = re.compile(r"""([A-Za-z][\w.-]*)(=|:\s?)(["']?)([^\s&,;"']{4,})""")


def is_secret_name(name: str) -> bool:
    """Whether a setting or variable of this name holds a secret when its value is text.

    Example: `hf_token`, `AWS_SECRET_ACCESS_KEY`, `db.password` do; `tokenizer`, `RAY_AUTH_TOKEN_PATH` do not.
    """
    segments = [segment.lower() for segment in _SEGMENT.findall(name)]
    if not segments or segments[-1] in _POINTERS:
        return False
    joined = "".join(segments)
    return any(word in joined for word in _ALWAYS) or bool({"token", "tokens", "key", "keys"} & set(segments))


def _hides(name: str, value: Json) -> bool:
    """Numbers under a name like `max_new_tokens` or `pad_token_id` are figures; under `auth_token` or
    `password` they are secrets. Flags and nulls never are, nor is the empty text."""
    if not is_secret_name(name) or value is None or isinstance(value, bool) or value in _PLAIN:
        return False
    segments = [segment.lower() for segment in _SEGMENT.findall(name)]
    strong = segments[-1] in ("token", "key") or any(word in "".join(segments) for word in _ALWAYS)
    return strong or not _is_number(value)


def _is_number(value: Json) -> bool:
    """Also a number as text, which is what flattened settings hold."""
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


class Redactor:
    """Replaces secrets by `[redacted]`. Knows the secrets of `environ` at the time it is made."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        source = os.environ if environ is None else environ
        values = {v for k, v in source.items() if is_secret_name(k) and len(v) >= MIN_SECRET_CHARS}
        ordered = sorted(values, key=len, reverse=True)
        self._known = re.compile("|".join(re.escape(v) for v in ordered)) if ordered else None

    def text(self, text: str) -> str:
        """Without known secrets and credential shapes; for model output too, which it leaves alone else."""
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        return _SHAPES.sub(REDACTED, text)

    def message(self, text: str) -> str:
        """As `text`, and also `name=value` where the name is a secret's; for errors and log lines."""

        def hide(match: re.Match[str]) -> str:
            name, sign, quote, value = match.groups()
            return f"{name}{sign}{quote}{REDACTED if _hides(name, value) else value}"

        return _ASSIGNMENT.sub(hide, self.text(text))

    def value(self, value: Json, name: str = "") -> Json:
        """A JSON value of any depth; `name` is the setting it belongs to."""
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(inner, str(key)) for key, inner in value.items()}
        if name and not isinstance(value, list) and _hides(name, value):
            return REDACTED
        if isinstance(value, str):
            return self.message(value)
        if isinstance(value, Sequence):
            return [self.value(inner, name) for inner in value]
        return value


def flatten(config: Mapping[str, Json], prefix: str = "") -> dict[str, str]:
    """Dotted keys and text values, as MLflow's parameters want them. Lists stay whole.

    Example: `{"grpo": {"lr": 0.1, "parts": ["a"]}}` gives `{"grpo.lr": "0.1", "grpo.parts": "['a']"}`.
    """
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
