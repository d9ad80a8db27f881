"""Hostile programs on gVisor's kernel. What they get of it is theirs; nothing of the host is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.actors.verify.programs.attempts import ATTEMPTS, PRELUDE, Target, opened_target
from tests.actors.verify.programs.exhaustion import EXHAUSTIONS
from tests.actors.verify.programs.forgeries import FORGERIES
from tests.actors.verify.programs.hostile_helpers import BUDGET, assert_contained, judged

from treadle.actors.verify.programs.cases import CallTest, StdinTest, Test
from treadle.actors.verify.programs.local import LocalSandbox
from treadle.actors.verify.programs.records import SandboxError
from treadle.actors.verify.programs.tiers import make_local, probed

pytestmark = [pytest.mark.slow, pytest.mark.hostile]
SLOW = replace(BUDGET, time_limit_s=15.0, total_s=60.0)
OF_ITS_OWN_KERNEL = {
    "UDP",  # to its own loopback
    "netlink",
    "being spared when memory runs out",
    "becoming root",  # of a user namespace without capabilities, on a kernel of its own
    "a user namespace",
    "a user namespace by clone",
    "io_uring",  # a number that this kernel does not know
    "memory that outlives it",
    "memory without a process",
    "memory shared without a file",
    "queues that outlive it",
}
"""What other tiers refuse because it would be the host's."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[LocalSandbox]:
    try:
        opened = make_local("gvisor")
    except SandboxError as error:
        pytest.skip(error.message)
    assert probed(opened, ()) == ""
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, list[str]]]:
    with opened_target(tmp_path_factory.mktemp("target")) as opened:
        yield opened


def test_no_attempt_to_get_out_reaches_the_host(
    sandbox: LocalSandbox, target: tuple[Target, list[str]]
) -> None:
    there, reached = target
    out = set()
    for name, code in ATTEMPTS.items():
        seen = judged(
            sandbox, "python", PRELUDE + code, [StdinTest(stdin=there.stdin(), stdout="held")], SLOW
        )
        assert_contained(seen, SLOW.time_limit_s)
        assert seen.details in ("", "wrong output"), (name, seen.details)
        if not seen.results[0].passed:
            out.add(name)
    assert out <= OF_ITS_OWN_KERNEL
    assert reached == []
    assert not (Path(there.folder) / "written").exists()


@pytest.mark.parametrize(
    "name",
    [
        "an endless loop",
        "sleeping",
        "a fork bomb of sessions",
        "all memory",
        "a flood of output",
        "many large files",
        "threads that spin",
    ],
)
def test_what_uses_all_up_is_stopped_in_time(sandbox: LocalSandbox, name: str) -> None:
    tests: list[Test] = [StdinTest(stdin="", stdout="cannot be printed")]
    seen = judged(sandbox, "python", EXHAUSTIONS[name].code, tests, replace(SLOW, time_limit_s=2.0))
    assert [result.passed for result in seen.results] == [False]
    assert_contained(seen, 2.0)


def test_forgeries_pass_nothing_and_the_right_program_passes(sandbox: LocalSandbox) -> None:
    tests: list[Test] = [CallTest(function="secret_sum", args=(1, 2), returns=7531)]
    for name in (
        "always equal",
        "leaving hard when called",
        "records of its own, with names found in frames",
    ):
        seen = judged(sandbox, "python", FORGERIES[name], tests, SLOW)
        assert [result.passed for result in seen.results] == [False], name
    seen = judged(sandbox, "python", "def secret_sum(a, b): return 7528 + a + b", tests, SLOW)
    assert [result.passed for result in seen.results] == [True], seen.details
