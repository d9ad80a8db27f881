"""Ways to look at a loaded configuration: flat, as YAML, as a difference, as a fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from treadle.platform.config.schema import KIND, as_tree, defaults_tree, specs_of
from treadle.platform.config.sources import add_scalars

Scalar: TypeAlias = str | int | float | bool | None


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own declaration


add_scalars(_Dumper)


def to_yaml(config: object) -> str:
    """The whole configuration as YAML; `load(type(config), <it>)` gives an equal object."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _plain(value: Any) -> Any:
    value = as_tree(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _enum_text(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        # Dollar and brace in a loaded value are text; unescaped they would be read as a reference.
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)
    return value


def _enum_text(member: Enum) -> str:
    return member.value if isinstance(member.value, str) else member.name


def flatten(config: object) -> dict[str, Scalar]:
    """Every leaf under its dotted key. Lists of scalars become JSON text; empty mappings are `{}`."""
    return dict(_leaves(as_tree(config), ""))


def _leaves(value: Any, path: str) -> list[tuple[str, Scalar]]:
    if isinstance(value, Mapping):
        if not value:
            return [(path, "{}")] if path else []
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{path}.{k}" if path else str(k))]
    if isinstance(value, list | tuple):
        if any(isinstance(item, Mapping) for item in value):
            return [leaf for i, item in enumerate(value) for leaf in _leaves(item, f"{path}.{i}")]
        return [(path, json.dumps([_scalar(item) for item in value], default=str))]
    return [(path, _scalar(value))]


def _scalar(value: Any) -> Any:
    if isinstance(value, Enum):
        return _enum_text(value)
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def diff_from_defaults(config: object) -> list[tuple[str, Scalar, Scalar]]:
    """`(dotted key, default, value)` of every leaf that differs from its default, in field order. A variant
    is compared with the defaults of its own kind, and its `kind` is listed where that was chosen. Mandatory
    leaves have the default `???`."""
    defaults = dict(_leaves(_defaults_beside(config, None), ""))
    return [
        (key, defaults.get(key), value)
        for key, value in flatten(config).items()
        if key not in defaults or defaults[key] != value
    ]


def _defaults_beside(config: Any, known: Any) -> dict[str, Any]:
    """A tree of defaults with the shape of `config`; `known` is the default its owner has for it, if any."""
    cls: type = type(config)
    own = defaults_tree(cls)
    kind = known.get(KIND) if isinstance(known, Mapping) else None
    if isinstance(known, Mapping) and kind == own.get(KIND):
        own = dict(known)
    elif KIND in own:
        own = {**own, KIND: kind}
    for name, spec in specs_of(cls).items():
        value = getattr(config, name)
        if not spec.structured or value is None:
            continue
        if spec.container == "map":
            beside = own[name] if isinstance(own[name], Mapping) else {}
            own[name] = {str(k): _defaults_beside(v, beside.get(str(k))) for k, v in value.items()}
        elif spec.container == "list":
            own[name] = [_defaults_beside(item, None) for item in value]
        else:
            own[name] = _defaults_beside(value, own[name])
    return own


def fingerprint(config: object) -> str:
    """32 hexadecimal digits that are the same for equal configurations, in every process. The order of
    mappings counts (stages run in theirs)."""
    text = json.dumps(_canonical(_plain(config)), ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _canonical(value: Any) -> Any:
    """Numbers that are equal get one spelling: 1.0 and 1."""
    if isinstance(value, Mapping):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
