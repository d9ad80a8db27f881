"""One program against its tests: compiled once, run in a sandbox, judged out here."""

from __future__ import annotations

import base64
import binascii
import io
import json
import secrets
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from treadle.actors.verify.programs.cases import CallTest, StdinTest, Test
from treadle.actors.verify.programs.languages import Toolchain
from treadle.actors.verify.programs.records import MIB, Command, Ended, Limits, Reason, Sandbox
from treadle.platform.errors import DataError

if TYPE_CHECKING:
    from treadle.platform.records import Json

MAX_PRODUCT_BYTES = 48 * MIB
_COMPILE_MEMORY_BYTES = 1536 * MIB
_MANAGED_PROCESSES = 160
"""Java and Node start a dozen threads per core, which the limit on processes counts."""
_MANAGED_FILES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a program may use. `time_limit_s` is wall time for one input, or for all calls together;
    `total_s` for everything, compiling included: tests that it leaves no time for are failed."""

    time_limit_s: float = 2.0
    compile_limit_s: float = 10.0
    total_s: float = 20.0
    memory_bytes: int = 512 * MIB
    output_bytes: int = MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Whether a test was passed and, where it was not, why in a few words (never the program's own)."""

    passed: bool
    detail: str = ""


class Submission:
    """Judges one program; `results` may be asked once.

    Inputs get a process each, in a sandbox of its own. Calls share one process, as the tests of a function
    do everywhere, and are taken up in a new one after a call that did not return.
    """

    def __init__(self, sandbox: Sandbox, toolchain: Toolchain, code: str, budget: Budget) -> None:
        self._sandbox = sandbox
        self._toolchain = toolchain
        self._code = code
        self._budget = budget
        self._until_s = time.monotonic() + budget.total_s
        self._source = code.encode("utf-8", "replace")

    def results(self, tests: Sequence[Test], stop_at_failure: bool) -> list[Result]:
        """One result per test, in order; up to and including the first failed one if `stop_at_failure`.

        Raises `DataError` for calls in a language without them, `SandboxError` when it is not the program
        that fails."""
        if not self._toolchain.language.harness and any(isinstance(test, CallTest) for test in tests):
            raise DataError(
                f"Calls of functions are not offered for {self._toolchain.language.name}.",
                "Give tests of stdin and stdout.",
            )
        files, failure = self._compiled()
        if failure:
            return [Result(passed=False, detail=failure)] * (1 if stop_at_failure else len(tests))
        found: list[Result] = []
        while len(found) < len(tests):
            test = tests[len(found)]
            if isinstance(test, StdinTest):
                found.append(self._of_input(files, test))
            else:
                found += self._of_calls(_leading_calls(tests[len(found) :]), stop_at_failure)
            if stop_at_failure and not found[-1].passed:
                break
        return found

    def _compiled(self) -> tuple[Mapping[str, bytes], str]:
        """The files a run needs, or why there are none."""
        source = {self._toolchain.source(self._code): self._source}
        command = self._toolchain.compiling(self._code)
        if not command:
            return source, ""
        wall_s = min(self._budget.compile_limit_s, self._left_s())
        ended = self._sandbox.run(
            Command(
                argv=command,
                files=source,
                limits=Limits(
                    wall_s=wall_s,
                    cpu_s=wall_s,
                    memory_bytes=_COMPILE_MEMORY_BYTES,
                    processes=_MANAGED_PROCESSES,
                    open_files=_MANAGED_FILES,
                    output_bytes=2 * MAX_PRODUCT_BYTES,
                    file_bytes=MAX_PRODUCT_BYTES,
                ),
            )
        )
        products = unpacked(ended.stdout) if ended.succeeded else {}
        return products, "" if products else f"does not compile ({_how(ended)})"

    def _of_input(self, files: Mapping[str, bytes], test: StdinTest) -> Result:
        if self._left_s() <= 0:
            return _OUT_OF_TIME
        argv = self._toolchain.running(self._code, self._budget.memory_bytes)
        ended = self._sandbox.run(
            Command(argv=argv, stdin=test.stdin.encode(), files=files, limits=self._limits())
        )
        if not ended.succeeded:
            return Result(passed=False, detail=_how(ended))
        passed = test.passes(ended.stdout)
        return Result(passed=passed, detail="" if passed else "wrong output")

    def _of_calls(self, tests: Sequence[CallTest], stop_at_failure: bool) -> list[Result]:
        """Results up to the first call without a record, which failed; all of them when nothing loads."""
        if self._left_s() <= 0:
            return [_OUT_OF_TIME] * len(tests)
        language = self._toolchain.language
        harness = Path(__file__).with_name(language.harness).read_bytes()
        calls = Calls(tests)
        ended = self._sandbox.run(
            Command(
                argv=self._toolchain.calling(self._budget.memory_bytes),
                stdin=calls.stdin,
                files={language.source: self._source, language.harness: harness},
                limits=self._limits(),
            )
        )
        results = calls.results(ended)
        missing = len(results) < len(tests) and not (results and stop_at_failure and not results[-1].passed)
        return [*results, Result(passed=False, detail=f"no answer ({_how(ended)})")] if missing else results

    def _limits(self) -> Limits:
        budget = self._budget
        wall_s = min(budget.time_limit_s, max(_LEAST_S, self._left_s()))
        address_space = self._toolchain.language.address_space
        return Limits(
            wall_s=wall_s,
            cpu_s=wall_s,
            memory_bytes=budget.memory_bytes,
            address_space_bytes=budget.memory_bytes if address_space else 0,
            processes=64 if address_space else _MANAGED_PROCESSES,
            open_files=64 if address_space else _MANAGED_FILES,
            output_bytes=budget.output_bytes,
        )

    def _left_s(self) -> float:
        return self._until_s - time.monotonic()


_LEAST_S = 0.5
"""What a run gets that begins while time is left: a sandbox takes a while to set up, and that is not the program's."""
_OUT_OF_TIME = Result(passed=False, detail="no time left")


class Calls:
    """The input of a harness for these calls, and what its output says about them.

    Each call has a fresh random name, which the program does not know while it loads. A record counts only
    under its call's name, in order and once; anything else in between makes all of them void, because then
    it was not the harness that wrote.
    """

    def __init__(self, tests: Sequence[CallTest]) -> None:
        self._tests = tests
        self._nonces = [secrets.token_hex(16) for _ in range(len(tests) + 1)]
        requests: list[dict[str, Json]] = [{}]
        requests += [{"function": test.function, "args": list(test.args)} for test in tests]
        lines = [
            json.dumps(request | {"nonce": nonce})
            for request, nonce in zip(requests, self._nonces, strict=True)
        ]
        self.stdin = "\n".join(lines).encode() + b"\n"

    def results(self, ended: Ended) -> list[Result]:
        """Results of the calls that were answered; all failed when the output cannot be the harness's."""
        lines = ended.stdout.split(b"\n")
        records = [line.partition(b" ") for line in lines[:-1]]
        names = [nonce.encode() for nonce in self._nonces]
        whole = len(lines[-1]) == 0 or not ended.succeeded  # a line may have been cut off by its end
        if [name for name, _, _ in records] != names[: len(records)] or not records or not whole:
            detail = "does not load" if not ended.stdout else "records that no harness wrote"
            return [Result(passed=False, detail=f"{detail} ({_how(ended)})")] * len(self._tests)
        return [_judged(test, record) for test, (_, _, record) in zip(self._tests, records[1:], strict=False)]


def _judged(test: CallTest, text: bytes) -> Result:
    try:
        record = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return Result(passed=False, detail="a result that is not JSON")
    if not isinstance(record, dict) or "returned" not in record:
        return Result(passed=False, detail="raised")
    passed = test.passes(record["returned"])
    return Result(passed=passed, detail="" if passed else "wrong result")


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _leading_calls(tests: Sequence[Test]) -> list[CallTest]:
    found = []
    for test in tests:
        if not isinstance(test, CallTest):
            break
        found.append(test)
    return found


def unpacked(text: bytes) -> dict[str, bytes]:
    """The files of a tar archive written as base64 text; empty where it is none, holds anything but plain
    files, or is too large. What wrote it was not trusted."""
    try:
        data = base64.b64decode(text, validate=True)
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            members = archive.getmembers()
            if sum(member.size for member in members) > MAX_PRODUCT_BYTES:
                return {}
            if not all(member.isreg() and "/" not in member.name for member in members):
                return {}
            return {member.name: archive.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    except (binascii.Error, tarfile.TarError, EOFError, UnicodeError, ValueError):
        return {}


def _how(ended: Ended) -> str:
    if ended.reason is not Reason.EXITED:
        return ended.reason.value
    return f"signal {ended.signal}" if ended.signal else f"status {ended.exit_code}"


def with_limits(budget: Budget, time_limit_s: float | None, memory_bytes: int | None) -> Budget:
    """The budget with a prompt's own limits. Raises `DataError` where they exceed the run's."""
    if time_limit_s is not None and not 0 < time_limit_s <= budget.total_s:
        raise DataError(
            f'The payload\'s "time_limit_s" is {time_limit_s}.',
            f"Give at most verify.options.code.total_s={budget.total_s}, or raise that.",
        )
    if memory_bytes is not None and not 0 < memory_bytes <= budget.memory_bytes:
        raise DataError(
            f'The payload\'s "memory_bytes" is {memory_bytes}.',
            f"Give at most verify.options.code.memory_bytes={budget.memory_bytes}, or raise that.",
        )
    return replace(
        budget,
        time_limit_s=time_limit_s or budget.time_limit_s,
        memory_bytes=memory_bytes or budget.memory_bytes,
    )
