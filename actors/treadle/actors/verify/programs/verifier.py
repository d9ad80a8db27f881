"""`code`: a program that passes its tests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from treadle.actors.verify.payload import choice, non_negative
from treadle.actors.verify.programs.cases import read_tests
from treadle.actors.verify.programs.extract import program_text
from treadle.actors.verify.programs.languages import (
    LANGUAGES,
    Toolchain,
    bare_toolchain,
    interpreter_prefixes,
    toolchain,
)
from treadle.actors.verify.programs.records import MIB, Command, Limits, Sandbox
from treadle.actors.verify.programs.submission import Budget, Submission, with_limits
from treadle.actors.verify.programs.tiers import LOCAL_TIERS, Choice, open_local
from treadle.platform.errors import ConfigError, DataError

if TYPE_CHECKING:
    from treadle.platform.records import Json

SANDBOXES = ("auto", *LOCAL_TIERS, "gvisor", "remote")
_VERSION_S = 10.0


class CodeVerifier:
    """Payload: `language` (python where it is missing), `tests` or `asserts` (see `cases.read_tests`);
    optional `compare`, `abs_tol`, `rel_tol`, and `time_limit_s` and `memory_bytes` up to the run's own.

    Accuracy is 1 where every test passes, else 0; with `partial` the share of tests that pass. What counts as
    the program, see `extract.program_text`; with `bare` an answer without a fenced block is one as a whole.
    A program that does not compile, crashes, is too slow or too large is wrong. A language whose tools are
    missing, or a sandbox that fails, raises.

    `sandbox` is `auto` (the strongest tier that holds on this machine), `bubblewrap`, `landlock`, `rlimits`
    (with `allow_rlimits_only`; protects from accidents only), `gvisor` or `remote` (`remote_url`, and the name
    of the environment variable that holds its token, `remote_token_env`, which `verify.pass_environment` must
    list). `languages` restricts what prompts may ask for; `toolchains` are further folders with a `bin`,
    separated by colons. `time_limit_s` holds for one input, or for all calls of a submission together;
    `total_s` for the whole submission: the verifier's deadline must exceed it.

    Example: payload `{"tests": [{"call": {"function": "add", "args": [1, 2]}, "returns": 3}]}`.
    """

    name = "code"

    def __init__(
        self,
        *,
        sandbox: str = "auto",
        allow_rlimits_only: bool = False,
        languages: str = "",
        toolchains: str = "",
        partial: bool = False,
        bare: bool = False,
        time_limit_s: float = 2.0,
        compile_limit_s: float = 10.0,
        total_s: float = 20.0,
        memory_bytes: int = 512 * MIB,
        output_bytes: int = MIB,
        remote_url: str = "",
        remote_token_env: str = "",
    ) -> None:
        if sandbox not in SANDBOXES:
            raise ConfigError(
                f"verify.options.code.sandbox={sandbox!r} does not exist.",
                f"Use one of {', '.join(SANDBOXES)}.",
            )
        self._partial = partial
        self._bare = bare
        self._budget = Budget(
            time_limit_s=time_limit_s,
            compile_limit_s=compile_limit_s,
            total_s=total_s,
            memory_bytes=memory_bytes,
            output_bytes=output_bytes,
        )
        _check(self._budget)
        prefixes = interpreter_prefixes(toolchains)
        self._sandbox = _opened(sandbox, allow_rlimits_only, prefixes, remote_url, remote_token_env)
        there = (
            {name: bare_toolchain(name) for name in LANGUAGES} if sandbox == "remote" else _found(prefixes)
        )
        versions = {name: _version(self._sandbox, tools) for name, tools in there.items()}
        self._toolchains = {name: tools for name, tools in there.items() if versions[name]}
        if languages:
            self._toolchains = {name: self._tools(name) for name in _listed(languages)}
        known = ", ".join(f"{name} {versions[name]}" for name in self._toolchains)
        self.version = f"1 ({self._sandbox.tier}; {known})"

    def score(self, completion: str, payload: Mapping[str, Json]) -> tuple[tuple[str, float], ...]:
        tools = self._tools(choice(payload, "language", ("python", *LANGUAGES)))
        tests = read_tests(payload)
        memory_bytes = non_negative(payload, "memory_bytes")
        budget = with_limits(
            self._budget,
            non_negative(payload, "time_limit_s"),
            None if memory_bytes is None else int(memory_bytes),
        )
        code = program_text(completion, tools.language.name, self._bare)
        if not code.strip():
            return (("accuracy", 0.0),)
        submission = Submission(self._sandbox, tools, code, budget)
        results = submission.results(tests, stop_at_failure=not self._partial)
        passed = sum(result.passed for result in results)
        return (("accuracy", passed / len(tests) if self._partial else float(passed == len(tests))),)

    def close(self) -> None:
        """Ends the sandbox's own processes; they also end with this process."""
        self._sandbox.close()

    def _tools(self, language: str) -> Toolchain:
        if language not in self._toolchains:
            raise DataError(
                f"Programs in {language} cannot be run: of the languages the run accepts, this machine has "
                f"{', '.join(self._toolchains)}.",
                f"Install {', '.join(LANGUAGES[language].tools)}, or see verify.options.code.languages.",
            )
        return self._toolchains[language]


def _check(budget: Budget) -> None:
    for name in ("time_limit_s", "compile_limit_s", "total_s"):
        if not 0 < getattr(budget, name) < float("inf"):
            raise ConfigError(
                f"verify.options.code.{name}={getattr(budget, name)} must be a number of seconds above 0."
            )
    if budget.memory_bytes < 32 * MIB or budget.output_bytes < 1:
        raise ConfigError(
            f"verify.options.code.memory_bytes={budget.memory_bytes} or output_bytes={budget.output_bytes} is "
            "too little.",
            "Give programs at least 33554432 bytes (32 MiB) of memory and 1 of output.",
        )


def _opened(
    sandbox: str, allow_rlimits_only: bool, prefixes: tuple[str, ...], url: str, token_env: str
) -> Sandbox:
    """The backend beyond this machine is imported only when asked for."""
    if sandbox == "remote":
        from treadle.actors.verify.programs.remote import RemoteSandbox

        return RemoteSandbox(url, token_env)
    return open_local(Choice(sandbox=sandbox, allow_rlimits_only=allow_rlimits_only, toolchains=prefixes))


def _listed(languages: str) -> list[str]:
    names = [name.strip() for name in languages.split(",") if name.strip()]
    for name in names:
        if name not in LANGUAGES:
            raise ConfigError(
                f"verify.options.code.languages names {name!r}.", f"Use some of {', '.join(LANGUAGES)}."
            )
    return names


def _found(prefixes: tuple[str, ...]) -> dict[str, Toolchain]:
    """The tools of all languages that are installed."""
    found = {}
    for name in LANGUAGES:
        try:
            found[name] = toolchain(name, prefixes)
        except DataError:
            continue
    return found


def _version(sandbox: Sandbox, tools: Toolchain) -> str:
    """What the last tool of a language says of itself, asked where it will run; empty where it does not run."""
    path = tools.tools[tools.language.tools[-1]]
    limits = Limits(wall_s=_VERSION_S, cpu_s=_VERSION_S, processes=160, open_files=256)
    ended = sandbox.run(Command(argv=(path, "--version"), limits=limits))
    found = re.search(rb"\d+(?:\.\d+)+", ended.stdout + ended.stderr)
    return found.group().decode() if found and ended.succeeded else ""
