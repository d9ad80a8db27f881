"""The languages a program may be written in: how each is compiled and run, and which tools that takes."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treadle.actors.verify.programs.confinement import PATH
from treadle.actors.verify.programs.records import MIB
from treadle.platform.errors import DataError

_HEAP_SHARE = 0.6
"""Of the memory limit; the rest is the runtime's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """`compile` is a shell script that leaves `products` (empty: nothing to compile), `run` the command.
    `{tool}` stands for the path of a tool, `{heap}` for a heap size in MiB, `{main}` for the Java class."""

    name: str
    tags: tuple[str, ...]
    """What else a fenced block of this language may be called."""
    source: str
    tools: tuple[str, ...]
    run: tuple[str, ...]
    compile: str = ""
    products: str = "main"
    address_space: bool = True
    """Whether a limit on address space can hold: managed runtimes reserve far more than they use."""
    harness: str = ""
    """The file in this package that calls functions of a program; empty where calls are not offered."""


_ALL = (
    Language(
        name="python",
        tags=("py", "python3", "py3"),
        source="solution.py",
        tools=("python3",),
        run=("{python3}", "-B", "-s", "solution.py"),
        harness="harness_python.py",
    ),
    Language(
        name="c",
        tags=("h",),
        source="main.c",
        tools=("gcc",),
        compile="{gcc} -O2 -std=gnu17 -w -o main main.c -lm",
        run=("./main",),
    ),
    Language(
        name="cpp",
        tags=("c++", "cc", "cxx", "hpp"),
        source="main.cpp",
        tools=("g++",),
        compile="{g++} -O2 -std=gnu++20 -w -o main main.cpp",
        run=("./main",),
    ),
    Language(
        name="javascript",
        tags=("js", "node", "mjs", "cjs"),
        source="solution.js",
        tools=("node",),
        run=("{node}", "--max-old-space-size={heap}", "solution.js"),
        address_space=False,
        harness="harness_javascript.js",
    ),
    Language(
        name="java",
        tags=(),
        source="{main}.java",
        tools=("java", "javac"),
        compile="{javac} -J-Xmx512m -J-XX:+UseSerialGC -nowarn -d . {main}.java",
        products="*.class",
        run=("{java}", "-Xmx{heap}m", "-Xss64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "{main}"),
        address_space=False,
    ),
    Language(
        name="rust",
        tags=("rs",),
        source="main.rs",
        tools=("rustc",),
        compile="{rustc} --edition 2021 -O -C debuginfo=0 -A warnings -o main main.rs",
        run=("./main",),
    ),
    Language(name="bash", tags=("sh", "shell"), source="main.sh", tools=("bash",), run=("{bash}", "main.sh")),
)
LANGUAGES: Mapping[str, Language] = {language.name: language for language in _ALL}
_OF_TAG = {tag: language.name for language in _ALL for tag in (language.name, *language.tags)}
_PUBLIC_CLASS = re.compile(
    r"(?:^|[;}])\s*public\s+(?:final\s+|abstract\s+)*(?:class|record|enum)\s+([A-Za-z_]\w*)", re.M
)


def language_of(tag: str) -> str | None:
    """The language a word stands for (`c++` is `cpp`), or None."""
    return _OF_TAG.get(tag.lower())


def main_class(language: str, code: str) -> str:
    """The class that Java code must be filed under: its public one, else `Main`."""
    found = _PUBLIC_CLASS.search(code) if language == "java" else None
    return found.group(1) if found else "Main"


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """A language with the tools found for it."""

    language: Language
    tools: Mapping[str, str]

    def source(self, code: str) -> str:
        return self.language.source.format(main=main_class(self.language.name, code))

    def compiling(self, code: str) -> tuple[str, ...]:
        """The command that compiles and writes the products to stdout as text, so that they can leave a
        sandbox that keeps no files; empty where nothing is compiled."""
        if not self.language.compile:
            return ()
        script = self.language.compile.format(**self.tools, main=main_class(self.language.name, code))
        return ("/bin/sh", "-c", f"{script} >&2 && tar -b1 -cf - {self.language.products} | base64 -w0")

    def running(self, code: str, memory_bytes: int) -> tuple[str, ...]:
        return self._filled(self.language.run, code, memory_bytes)

    def calling(self, memory_bytes: int) -> tuple[str, ...]:
        """The command that runs the harness instead of the program, as the program's last argument."""
        return (*self._filled(self.language.run[:-1], "", memory_bytes), self.language.harness)

    def _filled(self, parts: Sequence[str], code: str, memory_bytes: int) -> tuple[str, ...]:
        heap = max(16, int(memory_bytes * _HEAP_SHARE) // MIB)
        main = main_class(self.language.name, code)
        return tuple(part.format(**self.tools, heap=heap, main=main) for part in parts)


def toolchain(name: str, prefixes: Sequence[str] = ()) -> Toolchain:
    """The tools of a language, looked for in `prefixes` (each has a `bin`) and where systems keep programs.

    Raises `DataError` for an unknown language, and for tools that are missing or that the user without
    rights, as whom programs run, cannot read.
    """
    language = LANGUAGES.get(name)
    if language is None:
        raise DataError(f"There is no language {name!r} for programs.", f"Use one of {', '.join(LANGUAGES)}.")
    tools = {tool: _find(tool, prefixes) for tool in language.tools}
    missing = [tool for tool, path in tools.items() if not path]
    if missing:
        raise DataError(
            f"Programs in {name} need {', '.join(missing)}, which everybody can read, under "
            f"{', '.join((*prefixes, PATH.replace(':', ', ')))}.",
            "Install it with the system's packages, or name its folder in verify.options.code.toolchains.",
        )
    return Toolchain(language=language, tools={tool: str(path) for tool, path in tools.items()})


def bare_toolchain(name: str) -> Toolchain:
    """The tools of a language by name alone, for a machine that cannot be looked at."""
    language = LANGUAGES[name]
    return Toolchain(language=language, tools={tool: tool for tool in language.tools})


def interpreter_prefixes(configured: str) -> tuple[str, ...]:
    """The folders of `toolchains` (separated by colons), and our own Python's where the system has none."""
    prefixes = tuple(os.path.abspath(prefix) for prefix in configured.split(":") if prefix)
    if _find("python3", prefixes) is None and _find("python3", (sys.base_prefix,)):
        prefixes = (*prefixes, sys.base_prefix)
    return prefixes


def _find(tool: str, prefixes: Sequence[str]) -> str | None:
    for folder in (*(f"{prefix}/bin" for prefix in prefixes), *PATH.split(":")):
        path = shutil.which(tool, path=folder)
        if path and _for_everybody(path):
            return path
    return None


def _for_everybody(path: str) -> bool:
    """Whether a user without rights can execute it: programs of a launcher that is root have such a user."""
    real = os.path.realpath(path)
    if os.getuid() != 0:
        return os.access(real, os.X_OK)
    folder = os.path.dirname(real)
    while True:
        if not os.stat(folder).st_mode & stat.S_IXOTH:
            return False
        if folder == "/":
            return bool(os.stat(real).st_mode & stat.S_IXOTH)
        folder = os.path.dirname(folder)
