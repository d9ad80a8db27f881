"""Faults on order: what is accepted, when it happens, and that real processes die of it."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from treadle.platform.errors import ConfigError, FailpointError
from treadle.platform.failpoints import ENV, ENV_FILE, ENV_ONCE, POINTS, Faults, arm, failpoint, read_faults

ROOT = Path(__file__).parents[2]
POINT = "learner.before_step"


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm({})


def test_without_faults_a_failpoint_does_nothing() -> None:
    arm({})
    assert [failpoint(POINT) for _ in range(3)] == [False] * 3


def test_an_unset_failpoint_costs_next_to_nothing() -> None:
    arm({})
    start = time.perf_counter()
    for _ in range(100_000):
        failpoint(POINT)
    assert (time.perf_counter() - start) / 100_000 < 2e-6


def test_a_fault_happens_on_its_passage_and_only_then() -> None:
    arm({ENV: f"{POINT}=corrupt@3"})
    assert [failpoint(POINT) for _ in range(5)] == [False, False, True, False, False]


def test_the_first_passage_is_the_default_and_a_star_means_every_one() -> None:
    arm({ENV: f"{POINT}=corrupt; rollout.before_draw=corrupt@*"})
    assert [failpoint(POINT) for _ in range(2)] == [True, False]
    assert [failpoint("rollout.before_draw") for _ in range(3)] == [True] * 3


def test_once_in_all_processes_is_for_a_passage_and_not_for_every_one(tmp_path: Path) -> None:
    faults = {ENV: f"{POINT}=corrupt@1;rollout.before_draw=corrupt@*", ENV_ONCE: str(tmp_path)}
    for expected in (True, False):  # the second process finds what the first has left
        arm(faults)
        assert failpoint(POINT) is expected
        assert [failpoint("rollout.before_draw") for _ in range(2)] == [True] * 2
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"{POINT}=corrupt@1",
        "rollout.before_draw=corrupt@all",
    ]


def test_a_fault_for_one_subject_leaves_the_others_alone() -> None:
    arm({ENV: "rollout.mid_generation[rollout-1]=corrupt@2"})
    passed = [
        failpoint("rollout.mid_generation", name)
        for name in ("rollout-0", "rollout-1", "rollout-0", "rollout-1")
    ]
    assert passed == [False, False, False, True]
    arm({ENV: "rollout.mid_generation=corrupt@2"})
    passed = [
        failpoint("rollout.mid_generation", name) for name in ("rollout-0", "rollout-1", "rollout-0", "")
    ]
    assert passed == [False, True, False, False], "without a subject all passages count"


def test_raise_names_the_point() -> None:
    arm({ENV: f"{POINT}=raise:out of luck"})
    with pytest.raises(FailpointError, match=f"{POINT}: out of luck"):
        failpoint(POINT)


def test_sleep_blocks_the_caller() -> None:
    arm({ENV: f"{POINT}=sleep:0.05"})
    start = time.monotonic()
    failpoint(POINT)
    assert time.monotonic() - start >= 0.05


def test_a_file_may_order_several_faults_for_one_point(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    file.write_text(json.dumps({POINT: ["corrupt@1", "raise@2"]}))
    arm({ENV_FILE: str(file)})
    assert failpoint(POINT)
    with pytest.raises(FailpointError):
        failpoint(POINT)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learner.before_stepp=kill", "Did you mean 'learner.before_step'"),
        (f"{POINT}=explode", "unknown action 'explode'"),
        (f"{POINT}=kill@0", "@0 is no passage"),
        (f"{POINT}=kill@soon", "@soon is no passage"),
        (f"{POINT}=kill@", "@ is no passage"),
        (f"{POINT}=sleep", "no argument of sleep"),
        (f"{POINT}=sleep:inf", "no argument of sleep"),
        (f"{POINT}=allocate:much", "no argument of allocate"),
        (f"{POINT}=kill:9", "no argument of kill"),
        (POINT, "is no `name=action`"),
    ],
)
def test_a_fault_that_would_do_nothing_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_faults({ENV: text})


@pytest.mark.parametrize("content", ["[]", "{", '{"learner.before_step": 3}'])
def test_a_malformed_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "faults.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"faults\.json"):
        read_faults({ENV_FILE: str(file)})


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        read_faults({ENV_FILE: str(tmp_path / "nowhere.json")})


def _run(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    program = f"from treadle.platform.failpoints import failpoint\n{code}"
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_kill_ends_a_real_process_without_cleaning_up() -> None:
    passages = f"failpoint('{POINT}'); failpoint('{POINT}')"
    code = f"import atexit; atexit.register(print, 'cleaned'); {passages}; print('alive')"
    done = _run(code, **{ENV: f"{POINT}=kill@2"})
    assert (done.returncode, done.stdout) == (-9, "")


def test_exit_leaves_with_the_given_code() -> None:
    assert _run(f"failpoint('{POINT}')", **{ENV: f"{POINT}=exit:7"}).returncode == 7


def test_allocate_takes_memory_and_keeps_it_and_fails_where_there_is_none() -> None:
    used = "print(int(open('/proc/self/statm').read().split()[1]) * 4 // 1024)"
    done = _run(f"failpoint('{POINT}'); {used}", **{ENV: f"{POINT}=allocate:300"})
    assert int(done.stdout) >= 300
    done = _run(f"failpoint('{POINT}')", **{ENV: f"{POINT}=allocate:{2**33}"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "MemoryError"


def test_a_frozen_process_goes_on_when_it_is_told_to(tmp_path: Path) -> None:
    environ = {**os.environ, ENV: f"{POINT}=freeze", ENV_ONCE: str(tmp_path)}
    code = f"from treadle.platform.failpoints import failpoint; failpoint('{POINT}'); print('thawed')"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True
    ) as process:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert [file.read_text() for file in tmp_path.iterdir()] == [str(process.pid)]
        os.kill(process.pid, signal.SIGCONT)
        assert process.communicate(timeout=30)[0] == "thawed\n"


def test_once_lets_the_restarted_process_live(tmp_path: Path) -> None:
    environ = {ENV: f"{POINT}=kill", ENV_ONCE: str(tmp_path / "once")}
    codes = [_run(f"failpoint('{POINT}')", **environ).returncode for _ in range(3)]
    assert codes == [-9, 0, 0]


def test_without_once_the_restarted_process_dies_again() -> None:
    assert [_run(f"failpoint('{POINT}')", **{ENV: f"{POINT}=kill"}).returncode for _ in range(2)] == [-9, -9]


def test_two_faults_at_one_point_are_remembered_apart(tmp_path: Path) -> None:
    faults = read_faults({ENV: f"{POINT}=corrupt@1;{POINT}=corrupt@2", ENV_ONCE: str(tmp_path)})
    assert isinstance(faults, Faults)
    assert [faults.hit(POINT) for _ in range(3)] == [True, True, False]


def test_every_failpoint_in_the_code_is_declared_and_every_declared_one_exists() -> None:
    used = set()
    for folder in ("platform", "kernels", "cluster", "actors", "workflows", "dashboards"):
        for file in (ROOT / folder / "treadle").rglob("*.py"):
            used |= set(_names_in(ast.parse(file.read_text())))
    assert used == set(POINTS)


def _names_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "failpoint":
            argument = node.args[0]
            assert isinstance(argument, ast.Constant), (
                "a failpoint's name is written out, so that it can be found"
            )
            yield str(argument.value)
