"""From sources to one frozen dataclass, through OmegaConf exactly once.

OmegaConf checks and converts every leaf and resolves `${...}`. It cannot hold a union of dataclasses, so each
dataclass is shown to it as a twin in which structured fields are open slots; the twins of the chosen members
are put into the slots. After that no OmegaConf object is left.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from treadle.platform.config.layers import Merged, merge_layers
from treadle.platform.config.schema import MISSING, FieldSpec, specs_of
from treadle.platform.config.sources import Key, apply_overrides, layers_of
from treadle.platform.errors import ConfigError

T = TypeVar("T")


def load(
    schema: type[T],
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    library: Path | None = None,
) -> T:
    """Reads `source` into an instance of the dataclass `schema`.

    `source` is a YAML file, an fsspec URL or a mapping; a bare name is also looked up in `library` (a folder
    of shipped recipes). Its `base:` key names a file to start from. `overrides` are `key=value`
    (`a.b.kind=name` switches a variant, which starts from its own defaults) or `~key` (forget what the files
    say about a key). A method `check()` of any dataclass inside is called once its fields are set. Raises
    `ConfigError` with one message for whatever is wrong, naming file and line or override, and the dotted
    key.

    Example: `load(Recipe, "demo", ["stages.grpo.objective.kind=dapo"], library=RECIPES)`.
    """
    merged = merge_layers(schema, apply_overrides(layers_of(source, library), overrides))
    _refuse_missing(merged.tree)
    node = _node(schema, merged.tree, (), merged)
    try:
        plain = OmegaConf.to_container(node, resolve=True, structured_config_mode=SCMode.DICT)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        raise ConfigError(
            f"{merged.where(tuple(key.split('.')))}{key}: {_first_line(error).rstrip('.')}."
        ) from error
    return typing.cast(T, _instance(schema, plain, ()))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _refuse_missing(tree: Any) -> None:
    missing = [".".join(path) for path in _missing(tree, ())]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: no value.", "Set each of them in the file or as key=value.")


def _missing(tree: Any, path: Key) -> list[Key]:
    if isinstance(tree, Mapping):
        return [found for key, value in tree.items() for found in _missing(value, (*path, str(key)))]
    if isinstance(tree, list | tuple):
        return [found for i, value in enumerate(tree) for found in _missing(value, (*path, str(i)))]
    return [path] if isinstance(tree, str) and tree == MISSING else []


@functools.cache
def _twin(cls: type) -> type:
    """A dataclass with the leaves of `cls`, and `Any` where `cls` holds other configuration dataclasses."""
    hints = typing.get_type_hints(cls)
    fields = [
        (name, Any if spec.structured else hints[name], dataclasses.field(default=MISSING))
        for name, spec in specs_of(cls).items()
    ]
    return dataclasses.make_dataclass(cls.__name__, fields)


def _node(cls: type, tree: Mapping[str, Any], path: Key, merged: Merged) -> DictConfig:
    node: DictConfig = OmegaConf.structured(_twin(cls))
    for name, spec in specs_of(cls).items():
        here = (*path, name)
        if spec.structured:
            OmegaConf.update(node, name, _slot(spec, tree[name], here, merged), merge=False)
            continue
        try:
            OmegaConf.update(node, name, tree[name], merge=False)
        except OmegaConfBaseException as error:
            raise ConfigError(
                f"{merged.where(here)}{'.'.join(here)}: expected {_type_name(spec.annotation)}, "
                f"got {tree[name]!r} ({type(tree[name]).__name__})."
            ) from error
    return node


def _slot(spec: FieldSpec, tree: Any, path: Key, merged: Merged) -> Any:
    if tree is None:
        return None
    if spec.container == "map":
        return {k: _node(spec.member(v), v, (*path, k), merged) for k, v in tree.items()}
    if spec.container == "list":
        return [_node(spec.member(v), v, (*path, str(i)), merged) for i, v in enumerate(tree)]
    return _node(spec.member(tree), tree, path, merged)


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        if issubclass(annotation, Enum):
            return f"one of {', '.join(str(member.value) for member in annotation)}"
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def _instance(cls: type, plain: Any, path: Key) -> Any:
    values = {}
    for name, spec in specs_of(cls).items():
        value = plain[name]
        values[name] = _filled(spec, value, (*path, name)) if spec.structured and value is not None else value
    dotted = ".".join(path)
    try:
        instance = cls(**values)
        _check(instance)
    except ConfigError as error:
        if not dotted or dotted in error.message:
            raise
        raise ConfigError(f"{dotted}: {error.message}", error.remedy) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{dotted or cls.__name__}: {str(error).rstrip('.')}.") from error
    return instance


def _filled(spec: FieldSpec, value: Any, path: Key) -> Any:
    if spec.container == "map":
        return {key: _instance(spec.member(item), item, (*path, key)) for key, item in value.items()}
    if spec.container == "list":
        items = [_instance(spec.member(item), item, (*path, str(i))) for i, item in enumerate(value)]
        return tuple(items) if spec.is_tuple else items
    return _instance(spec.member(value), value, path)


def _check(instance: object) -> None:
    check = getattr(instance, "check", None)
    if callable(check) and not inspect.signature(check).parameters:
        check()
