"""What a configuration dataclass looks like: its fields, and the unions whose member a `kind:` key selects.

A union of dataclasses cannot be switched by OmegaConf once it is merged, so unions are resolved here, by
name, before merging. A union is declared once, beside its members:

    variants("objective", {"grpo": Grpo, "dapo": Dapo})

and used by any number of fields, as a single value or as the values of a mapping:

    objective: Objective = variant("objective", kind="grpo")
    stages: dict[str, Stage] = variant_map("stage")

Every member is a frozen dataclass whose first field is `kind: str = "<its name in the union>"`, so that a
loaded object says which member it is.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from treadle.platform.errors import ConfigError

KIND = "kind"
MISSING = "???"
_UNION = "treadle.variant"
_UNIONS: dict[str, dict[str, type]] = {}


def variants(union: str, members: Mapping[str, type]) -> None:
    """Adds members to a union, creating it on first use. Raises `ConfigError` for a member that is no frozen
    dataclass, whose `kind` does not default to its name, or whose name another class already has."""
    known = _UNIONS.setdefault(union, {})
    for kind, cls in members.items():
        _check_member(union, kind, cls)
        other = known.get(kind, cls)
        if other.__qualname__ != cls.__qualname__:
            raise ConfigError(
                f"variant {kind!r} of {union!r} is already {other.__module__}.{other.__qualname__}.",
                "Give the new member another name.",
            )
        known[kind] = cls


def _check_member(union: str, kind: str, cls: type) -> None:
    fields = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    frozen = fields and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    if not frozen or KIND not in fields or fields[KIND].default != kind:
        raise ConfigError(
            f"variant {kind!r} of {union!r}: {cls.__qualname__} must be a frozen dataclass with the field "
            f'`kind: str = "{kind}"`.'
        )


def members_of(union: str) -> Mapping[str, type]:
    """The members by kind, in order of registration."""
    if union not in _UNIONS:
        raise ConfigError(
            f"no variants are registered under {union!r}.",
            f"Known unions: {', '.join(sorted(_UNIONS)) or 'none'}; import the module that declares it.",
        )
    return _UNIONS[union]


def variant(union: str, *, kind: str | None = None) -> Any:
    """A dataclass field that holds one member of `union`, by default the one named `kind`; without it the
    field is mandatory. The annotation may be anything the members satisfy (a Protocol, a base class); `X |
    None` allows null."""
    if kind is None:
        return dataclasses.field(metadata={_UNION: union})
    return dataclasses.field(metadata={_UNION: union}, default_factory=lambda: _made(union, kind))


def _made(union: str, kind: str) -> Any:
    return members_of(union)[kind]()


def variant_map(union: str) -> Any:
    """A dataclass field `dict[str, Member]`: an ordered mapping of names to members of `union`."""
    return dataclasses.field(metadata={_UNION: union}, default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FieldSpec:
    """One field of a configuration dataclass. A field is structured when it holds other configuration
    dataclasses: members of `union`, or instances of `cls`; singly, in a "map" or in a "list"."""

    name: str
    annotation: Any
    union: str | None = None
    cls: type | None = None
    container: str = ""  # "", "map" or "list"
    optional: bool = False
    is_tuple: bool = False

    @property
    def structured(self) -> bool:
        return self.union is not None or self.cls is not None

    def member(self, tree: Mapping[str, Any]) -> type:
        """The class of a complete tree (one with its `kind`)."""
        if self.cls is not None:
            return self.cls
        assert self.union is not None
        return members_of(self.union)[tree[KIND]]


@functools.cache
def specs_of(cls: type) -> dict[str, FieldSpec]:
    """The init fields of a configuration dataclass by name, in declaration order."""
    hints = get_type_hints(cls)
    return {
        f.name: _spec(f.name, hints[f.name], f.metadata.get(_UNION))
        for f in dataclasses.fields(cls)
        if f.init
    }


def _spec(name: str, annotation: Any, union: str | None) -> FieldSpec:
    inner, optional = _strip_none(annotation)
    origin, args = get_origin(inner), get_args(inner)
    container, element = "", inner
    if origin in (dict, Mapping):
        container, element = "map", args[1]
    elif origin in (list, tuple):
        container, element = "list", args[0]
    cls = element if union is None and dataclasses.is_dataclass(element) else None
    return FieldSpec(
        name=name,
        annotation=annotation,
        union=union,
        cls=cls if isinstance(cls, type) else None,
        container=container,
        optional=optional,
        is_tuple=origin is tuple,
    )


def _strip_none(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    args = [a for a in get_args(annotation) if a is not type(None)]
    optional = len(args) < len(get_args(annotation))
    return (args[0] if optional and len(args) == 1 else annotation), optional


def as_tree(value: Any) -> Any:
    """A configuration value with every dataclass turned into a dict; leaves are left as they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: as_tree(getattr(value, name)) for name in specs_of(type(value))}
    if isinstance(value, Mapping):
        return {str(key): as_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(as_tree(item) for item in value)
    return value


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default, or `MISSING` where the field is mandatory."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING if field.default is dataclasses.MISSING else field.default


def defaults_tree(cls: type) -> dict[str, Any]:
    """The tree of a class on which nothing was set. Mandatory leaves are `MISSING`; a mandatory nested
    dataclass is its own defaults, so that its mandatory leaves are reported one by one."""
    tree = {}
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        default, spec = default_of(f), specs_of(cls)[f.name]
        if isinstance(default, str) and default == MISSING and spec.cls and not spec.container:
            tree[f.name] = defaults_tree(spec.cls)
        else:
            tree[f.name] = as_tree(default)
    return tree


def did_you_mean(wrong: str, valid: Iterable[str]) -> str:
    """One sentence: the closest names if any, then all of them."""
    names = list(valid)
    close = difflib.get_close_matches(wrong, names, n=2, cutoff=0.6)
    hint = f"Did you mean {' or '.join(repr(name) for name in close)}? " if close else ""
    return f"{hint}Valid: {', '.join(names) or 'nothing'}."
