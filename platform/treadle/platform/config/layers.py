"""Lays one source of settings over what is known so far, guided by the dataclasses.

Every step checks names, so a misspelt key is reported with the file and line that holds it. Values of leaves
are checked later, when OmegaConf merges them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, get_args, get_origin

from treadle.platform.config.schema import KIND, FieldSpec, defaults_tree, did_you_mean, members_of, specs_of
from treadle.platform.config.sources import Key, Layer
from treadle.platform.errors import ConfigError

Tree = dict[str, Any]


@dataclass(slots=True)
class Merged:
    """The effective settings, and for each leaf that a source set the place where it was set."""

    tree: Tree
    origins: dict[Key, str] = field(default_factory=dict)

    def where(self, path: Key) -> str:
        """A prefix for messages: the place of the setting, or nothing for a default."""
        origin = self.origins.get(path)
        return f"{origin}: " if origin else ""


def merge_layers(cls: type, layers: list[Layer]) -> Merged:
    """Lays the sources over the defaults of `cls`, the last one on top."""
    merged = Merged(tree=defaults_tree(cls))
    for layer in layers:
        merged.tree = _Overlay(layer, merged.origins).lay(cls, merged.tree, layer.tree, ())
    return merged


@dataclass(frozen=True, slots=True)
class _Overlay:
    layer: Layer
    origins: dict[Key, str]

    def lay(self, cls: type, lower: Tree, upper: Mapping[str, Any], path: Key) -> Tree:
        specs, result = specs_of(cls), dict(lower)
        for key, value in upper.items():
            if key not in specs:
                dotted = ".".join((*path, str(key)))
                raise ConfigError(
                    f"{self.layer.where((*path, str(key)))}: unknown key {dotted!r}.",
                    did_you_mean(str(key), specs),
                )
            result[key] = self._field(specs[key], lower.get(key), value, (*path, key))
        return result

    def _field(self, spec: FieldSpec, lower: Any, upper: Any, path: Key) -> Any:
        if not spec.structured:
            return self._leaf(spec, lower, upper, path)
        if spec.container == "map":
            return self._map(spec, lower if isinstance(lower, Mapping) else {}, upper, path)
        if spec.container == "list":
            if not isinstance(upper, list | tuple):
                raise self._wrong(path, "a list (lists are replaced as a whole)", upper)
            return [self._entry(spec, None, item, (*path, str(i))) for i, item in enumerate(upper)]
        if upper is None and spec.optional:
            return None
        return self._entry(spec, lower if isinstance(lower, Mapping) else None, upper, path)

    def _leaf(self, spec: FieldSpec, lower: Any, upper: Any, path: Key) -> Any:
        # A mapping that is written down takes the place of the default one: entries that nobody wrote would be
        # in it otherwise. `a.b.entry=value` and a file above another one change entries.
        changes_entries = path in self.origins or len(self.layer.at) > len(path)
        self.origins[path] = self.layer.where(path)
        if changes_entries:
            upper = _laid_over(lower, upper)
        return self._as_written(spec.annotation, upper, path)

    def _as_written(self, annotation: Any, value: Any, path: Key) -> Any:
        """A text field keeps `1e5` and `true` as they were typed, not as the numbers they look like. An
        enumeration is chosen by value as well as by name."""
        args = get_args(annotation)
        if isinstance(annotation, type) and issubclass(annotation, Enum) and isinstance(value, str):
            return next((member.name for member in annotation if member.value == value), value)
        if isinstance(value, int | float):
            is_text = annotation is str or set(args) == {str, type(None)}
            return self.layer.texts.get(path, value) if is_text else value
        if isinstance(value, list | tuple) and get_origin(annotation) in (list, tuple) and args:
            return [self._as_written(args[0], item, (*path, str(i))) for i, item in enumerate(value)]
        if isinstance(value, Mapping) and get_origin(annotation) is dict:
            return {str(k): self._as_written(args[1], item, (*path, str(k))) for k, item in value.items()}
        return value

    def _map(self, spec: FieldSpec, lower: Mapping[str, Any], upper: Any, path: Key) -> Tree:
        """Entries are merged by name; null removes one. The order is the lower one with new names behind,
        unless the upper mapping names every entry: then it is the upper one."""
        if not isinstance(upper, Mapping):
            raise self._wrong(path, "a mapping of names", upper)
        entries: Tree = dict(lower)
        for key, value in upper.items():
            name = str(key)
            if value is None:
                entries.pop(name, None)
            else:
                entries[name] = self._entry(spec, entries.get(name), value, (*path, name), siblings=lower)
        names = [str(key) for key in upper]
        order = names if set(names) >= set(lower) else list(entries)
        return {name: entries[name] for name in order if name in entries}

    def _entry(
        self, spec: FieldSpec, lower: Any, upper: Any, path: Key, siblings: Mapping[str, Any] | None = None
    ) -> Tree:
        if not isinstance(upper, Mapping):
            hint = f"a mapping with `{KIND}:`" if spec.union else "a mapping"
            raise self._wrong(path, hint, upper)
        if spec.cls is not None:
            return self.lay(spec.cls, lower or defaults_tree(spec.cls), upper, path)
        cls = self._member(spec, lower, upper, path, siblings)
        kind = cls.__dataclass_fields__[KIND].default
        # Settings tuned for one kind must not leak into another: a new kind starts from its own defaults.
        if lower is None or lower.get(KIND) != kind:
            lower = defaults_tree(cls)
        return self.lay(cls, lower, upper, path)

    def _member(
        self,
        spec: FieldSpec,
        lower: Any,
        upper: Mapping[str, Any],
        path: Key,
        siblings: Mapping[str, Any] | None,
    ) -> Any:
        assert spec.union is not None
        members, dotted = members_of(spec.union), ".".join(path)
        kind = upper.get(KIND, (lower or {}).get(KIND))
        if kind is None:
            entries = f" Entries so far: {', '.join(siblings)}." if siblings else ""
            raise ConfigError(
                f"{self.layer.where(path)}: {dotted} has no `{KIND}`.",
                f"Set {dotted}.{KIND} to one of: {', '.join(members)}.{entries}",
            )
        if kind not in members:
            raise ConfigError(
                f"{self.layer.where((*path, KIND))}: {dotted}.{KIND}: {kind!r} is no {spec.union}.",
                did_you_mean(str(kind), members),
            )
        return members[kind]

    def _wrong(self, path: Key, expected: str, got: object) -> ConfigError:
        return ConfigError(f"{self.layer.where(path)}: {'.'.join(path)}: expected {expected}, got {got!r}.")


def _laid_over(lower: Any, upper: Any) -> Any:
    """Two mappings merged entry by entry, at every depth; anything else is replaced."""
    if not (isinstance(lower, Mapping) and isinstance(upper, Mapping)):
        return upper
    return {**lower, **{key: _laid_over(lower.get(key), value) for key, value in upper.items()}}
