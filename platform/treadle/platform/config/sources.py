"""Where settings come from: files, URLs, mappings and `key=value` overrides, each one a `Layer`.

YAML is read with the scalars of YAML 1.2: `1e-4` is a number, `yes`, `on`, `12:30` and `2026-01-01` are text,
only `true` and `false` are booleans. A repeated key is an error instead of a silent overwrite.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from treadle.platform.config.schema import KIND, did_you_mean
from treadle.platform.errors import ConfigError
from treadle.platform.storage import open_parent

BASE = "base"
_MAX_DEPTH = 64
Key = tuple[str, ...]

SCALARS: Sequence[tuple[str, str, str]] = (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("tag:yaml.org,2002:merge", r"^(?:<<)$", "<"),
)


class Yaml12Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own declaration


def add_scalars(target: Any) -> None:
    """Gives a PyYAML loader or dumper class the implicit scalars of this module."""
    for tag, pattern, first in SCALARS:
        target.add_implicit_resolver(tag, re.compile(pattern), [c if c != "\0" else "" for c in first])


add_scalars(Yaml12Loader)
# int("010") is ten, as in YAML 1.2; PyYAML's own constructor reads an octal number.
Yaml12Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One source of settings. `lines` and `texts` give, per path, the line it stands on and how a scalar was
    written; they are empty for mappings that were handed over in Python. `at` is the key that an override
    assigns to, and empty for a file."""

    name: str
    tree: Mapping[str, Any]
    at: Key = ()
    lines: Mapping[Key, int] = field(default_factory=dict)
    texts: Mapping[Key, str] = field(default_factory=dict)

    def where(self, path: Key) -> str:
        """`file:line` of the setting, or of the nearest mapping around it."""
        for n in range(len(path), 0, -1):
            if path[:n] in self.lines:
                return f"{self.name}:{self.lines[path[:n]]}"
        return self.name


def parse_yaml(text: str, name: str) -> Layer:
    """A layer from YAML text. Raises `ConfigError` naming file and line for a syntax error, a repeated key,
    an empty document or one that is no mapping."""
    try:
        loader = Yaml12Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{name} is empty.", "Write at least one `key: value` line.")
        _refuse_repeats(node, name)
        tree = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{_mark(error, name)}: not valid YAML: {_problem(error)}.") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: expected `key: value` lines, got {type(tree).__name__}.")
    lines: dict[Key, int] = {}
    texts: dict[Key, str] = {}
    for path, item, line in _walk(node, ()):
        lines[path] = line
        if isinstance(item, yaml.ScalarNode):
            texts[path] = item.value
    return Layer(name=name, tree=tree, lines=lines, texts=texts)


def _mark(error: yaml.YAMLError, name: str) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{name}:{mark.line + 1}" if mark else name


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).replace("\n", " ")


def _refuse_repeats(node: yaml.Node, name: str, depth: int = 0) -> None:
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{name}: nested deeper than {_MAX_DEPTH} levels (an alias that contains itself?).")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeats(item, name, depth + 1)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if str(key.value) in seen and key.value != "<<":
            raise ConfigError(
                f"{name}:{line}: the key {key.value!r} was already given on line {seen[str(key.value)]}.",
                "Keep one of the two.",
            )
        seen[str(key.value)] = line
        _refuse_repeats(value, name, depth + 1)


def _walk(node: yaml.Node, path: Key) -> Iterator[tuple[Key, yaml.Node, int]]:
    children: list[tuple[str, yaml.Node, int]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(str(k.value), v, k.start_mark.line + 1) for k, v in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(i), v, v.start_mark.line + 1) for i, v in enumerate(node.value)]
    for key, child, line in children:
        yield (*path, key), child, line
        yield from _walk(child, (*path, key))


def layers_of(source: str | Path | Mapping[str, Any], library: Path | None) -> list[Layer]:
    """The source and the chain of files its `base:` key names, the outermost base first."""
    chain: list[Layer] = []
    seen: list[str] = []
    current: str | None
    if isinstance(source, Mapping):
        chain.append(Layer(name="settings", tree=source))
        current = _base_of(chain[-1], "", library)
    else:
        current = _locate(str(source), "", library)
    while current is not None:
        if current in seen:
            raise ConfigError(f"{' -> '.join([*seen, current])}: `{BASE}:` leads back to its own file.")
        seen.append(current)
        chain.append(parse_yaml(_read(current), current))
        current = _base_of(chain[-1], current, library)
    return [_without_base(layer) for layer in reversed(chain)]


def _without_base(layer: Layer) -> Layer:
    tree = {key: value for key, value in layer.tree.items() if key != BASE}
    return Layer(name=layer.name, tree=tree, lines=layer.lines, texts=layer.texts)


def _base_of(layer: Layer, location: str, library: Path | None) -> str | None:
    base = layer.tree.get(BASE)
    if base is None:
        return None
    if not isinstance(base, str):
        raise ConfigError(f"{layer.where((BASE,))}: {BASE}: expected the name of a file, got {base!r}.")
    return _locate(base, location.rpartition("/")[0], library, said_by=layer.where((BASE,)))


def _locate(name: str, folder: str, library: Path | None, said_by: str = "") -> str:
    """The URL or path a recipe is read from: as given, beside the file that names it, or in the library."""
    beside = f"{folder}/{name}" if folder and not name.startswith("/") else name
    if "://" in beside:
        return name if "://" in name else beside
    shipped = [library / name, library / f"{name}.yaml"] if library else []
    for path in [Path(beside), *shipped]:
        if path.is_file():
            return str(path)
    names = sorted(p.stem for p in library.glob("*.yaml")) if library else []
    prefix = f"{said_by}: {BASE}: " if said_by else ""
    reason = "is a folder" if Path(beside).is_dir() else "does not exist"
    raise ConfigError(
        f"{prefix}{beside} {reason}.",
        f"Give a path, or a shipped recipe. {did_you_mean(name, names)}" if names else "",
    )


def _read(location: str) -> str:
    store, name = open_parent(location)
    data = store.try_read(name)
    if data is None:
        raise ConfigError(f"{location} does not exist.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{location} is not a text file (byte {error.start} is not UTF-8).") from error


def apply_overrides(files: list[Layer], overrides: Sequence[str]) -> list[Layer]:
    """The files followed by one layer per `key=value`. `~key` makes the files forget a key, so that its
    default shows again. Those that set a `kind` come first: a kind and the keys that belong to it may be
    given in any order."""
    parsed: list[tuple[Key, Layer]] = []
    for text in overrides:
        if text.startswith("~") and "=" not in text:
            files = _forget(files, _split(text[1:], text))
        else:
            parsed.append(_assignment(text))
    parsed.sort(key=lambda pair: (0, len(pair[0])) if pair[0][-1] == KIND else (1, 0))
    return files + [layer for _, layer in parsed]


def _split(dotted: str, text: str) -> Key:
    path = tuple(part.strip() for part in dotted.split("."))
    if not all(path):
        raise ConfigError(
            f"override {text!r} is malformed.", "Write `key=value`, `a.b.key=value` or `~a.b.key`."
        )
    return path


def _assignment(text: str) -> tuple[Key, Layer]:
    dotted, equals, raw = text.partition("=")
    if not equals:
        raise ConfigError(
            f"override {text!r} is malformed.", "Write `key=value`, `a.b.key=value` or `~a.b.key`."
        )
    path = _split(dotted, text)
    name = f"override {text!r}"
    value: Any = ""
    texts = {path: raw}
    if raw.strip():
        # As the value of a key, so that quotes, lists and mappings in braces are read as in a file.
        layer = _parse_value(raw, name)
        value = layer.tree["value"]
        texts = {(*path, *key[1:]): written for key, written in layer.texts.items()}
    tree: Any = value
    for part in reversed(path):
        tree = {part: tree}
    return path, Layer(name=name, tree=tree, at=path, texts=texts)


def _parse_value(raw: str, name: str) -> Layer:
    try:
        return parse_yaml(f"value: {raw}", name)
    except ConfigError as error:
        raise ConfigError(
            f"{name}: the value {raw!r} cannot be read.", "Put it in quotes: key='\"value\"'."
        ) from error


def _forget(files: list[Layer], path: Key) -> list[Layer]:
    kept = [Layer(name=f.name, tree=_drop(f.tree, path), lines=f.lines, texts=f.texts) for f in files]
    if all(old.tree == new.tree for old, new in zip(files, kept, strict=True)):
        said = dict.fromkeys(".".join(key) for layer in files for key in layer.lines)
        raise ConfigError(
            f"override '~{'.'.join(path)}': no file sets this key, so there is nothing to take back.",
            did_you_mean(".".join(path), said) if said else "",
        )
    return kept


def _drop(tree: Mapping[str, Any], path: Key) -> Mapping[str, Any]:
    if path[0] not in tree:
        return tree
    if len(path) == 1:
        return {key: value for key, value in tree.items() if key != path[0]}
    inner = tree[path[0]]
    return {**tree, path[0]: _drop(inner, path[1:])} if isinstance(inner, Mapping) else tree
