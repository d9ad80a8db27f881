"""What every local sandbox promises, in each tier."""

from __future__ import annotations

import glob
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.actors.verify.programs.hostile_helpers import strangers

from treadle.actors.verify.programs.local import LocalSandbox
from treadle.actors.verify.programs.records import MIB, Command, Ended, Limits, Reason, SandboxError
from treadle.actors.verify.programs.tiers import LOCAL_TIERS, make_local, running

pytestmark = pytest.mark.processes

PYTHON = "/usr/bin/python3"


@pytest.fixture(scope="module", params=(*LOCAL_TIERS, pytest.param("gvisor", marks=pytest.mark.hostile)))
def sandbox(request: pytest.FixtureRequest) -> Iterator[LocalSandbox]:
    try:
        opened = make_local(request.param)
    except SandboxError as error:
        pytest.skip(f"{request.param}: {error.message}")
    yield opened
    opened.close()


def run(sandbox: LocalSandbox, code: str, stdin: bytes = b"", **limits: float) -> Ended:
    return sandbox.run(
        Command(
            argv=(PYTHON, "-c", code),
            stdin=stdin,
            limits=Limits(**{"wall_s": 5.0, "cpu_s": 5.0, **limits}),  # type: ignore[arg-type]
        )
    )


def test_it_gives_back_output_errors_and_status(sandbox: LocalSandbox) -> None:
    code = "import sys; print(sys.stdin.read()[::-1]); print('e', file=sys.stderr); sys.exit(7)"
    ended = run(sandbox, code, b"abc")
    assert (ended.stdout, ended.stderr) == (b"cba\n", b"e\n")
    assert (ended.reason, ended.exit_code, ended.signal) == (Reason.EXITED, 7, None)
    assert not ended.succeeded
    assert 0 < ended.cpu_s < 5  # setting the sandbox up included
    assert 0 < ended.wall_s < 5


def test_it_gives_back_the_signal(sandbox: LocalSandbox) -> None:
    ended = run(sandbox, "import os; os.kill(os.getpid(), 11)")
    assert (ended.reason, ended.exit_code, ended.signal) == (Reason.EXITED, None, 11)


def test_a_program_that_is_not_there_is_the_commands_fault(sandbox: LocalSandbox) -> None:
    assert sandbox.run(Command(argv=("/usr/bin/no-such-program",))).exit_code == 127


def test_files_are_there_to_read_and_to_run_and_gone_afterwards(sandbox: LocalSandbox) -> None:
    script = b'#!/bin/sh\ncat "$1"; echo new > new; ls\n'
    ended = sandbox.run(
        Command(argv=("./script", "a file"), files={"script": script, "a file": b"\x00\xff\n"})
    )
    assert ended.stdout == b"\x00\xff\na file\nnew\nscript\n"
    assert sandbox.run(Command(argv=("/bin/ls",))).stdout == b""


def test_large_input_and_large_files_come_whole(sandbox: LocalSandbox) -> None:
    ended = sandbox.run(
        Command(
            argv=("/bin/sh", "-c", "wc -c < big; wc -c"),
            stdin=b"x" * (12 * MIB),
            files={"big": b"y" * (20 * MIB)},
            limits=Limits(wall_s=10.0),
        )
    )
    assert ended.stdout.split() == [b"%d" % (20 * MIB), b"%d" % (12 * MIB)]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_up_to_the_limit_is_kept_and_one_byte_more_ends_it(sandbox: LocalSandbox, stream: str) -> None:
    code = "import sys; getattr(sys, {!r}).write('x' * {}); sys.exit(0)"
    full = run(sandbox, code.format(stream, 200_000), output_bytes=200_000)
    assert full.succeeded
    assert len(getattr(full, stream)) == 200_000
    over = run(sandbox, code.format(stream, 200_001), output_bytes=200_000)
    assert over.reason is Reason.OUTPUT_LIMIT
    assert over.exit_code is None
    assert len(getattr(over, stream)) == 200_000


def test_wall_time_cpu_time_and_memory_are_told_apart(sandbox: LocalSandbox) -> None:
    slept = run(sandbox, "import time; time.sleep(9)", wall_s=0.4)
    assert slept.reason is Reason.WALL_TIME
    assert 0.4 <= slept.wall_s < 1.0
    spun = run(sandbox, "while True: pass", cpu_s=0.3)
    assert spun.reason is Reason.CPU_TIME
    assert 0.3 <= spun.cpu_s < 1.5
    ate = run(sandbox, "x = []\nwhile True: x.append(bytearray(2**20))", memory_bytes=100 * MIB)
    assert ate.reason is Reason.MEMORY


def test_address_space_makes_allocation_fail_inside(sandbox: LocalSandbox) -> None:
    code = "try: bytearray(300 * 2**20)\nexcept MemoryError: print('no')"
    assert run(sandbox, code, address_space_bytes=200 * MIB).stdout == b"no\n"
    assert run(sandbox, code).stdout == b""


def test_it_can_write_what_the_limit_allows_and_no_more(sandbox: LocalSandbox) -> None:
    code = "open('f', 'wb').write(bytes({} * 2**20)); print('written')"
    assert run(sandbox, code.format(6), file_bytes=8 * MIB).stdout == b"written\n"
    over = run(sandbox, code.format(9), file_bytes=8 * MIB)
    assert over.stdout == b""
    assert not over.succeeded


def test_processes_and_descriptors_are_limited(sandbox: LocalSandbox) -> None:
    code = """
import os, time
n = 0
try:
    while n < 100:
        if os.fork() == 0: time.sleep(9); os._exit(0)
        n += 1
except OSError:
    pass
print(n)
"""
    assert 5 <= int(run(sandbox, code, processes=20).stdout) < 20
    code = (
        "n = 0\nx = []\ntry:\n  while n < 999: x.append(open('/dev/null')); n += 1\nexcept OSError: print(n)"
    )
    assert 20 < int(run(sandbox, code, open_files=40).stdout) < 40


def test_the_environment_is_its_own(sandbox: LocalSandbox) -> None:
    os.environ["TREADLE_TEST_SECRET"] = "x"
    try:
        names = set(json.loads(run(sandbox, "import json, os; print(json.dumps(sorted(os.environ)))").stdout))
    finally:
        del os.environ["TREADLE_TEST_SECRET"]
    assert {"PATH", "HOME", "LANG", "PYTHONHASHSEED"} <= names
    assert "TREADLE_TEST_SECRET" not in names
    assert "PYTHONPATH" not in names


def test_signals_that_python_ignores_work_inside(sandbox: LocalSandbox) -> None:
    ended = sandbox.run(Command(argv=("/bin/sh", "-c", "yes | head -1; kill -PIPE $$")))
    assert (ended.stdout, ended.signal) == (b"y\n", signal.SIGPIPE)


def test_many_commands_leave_no_descriptor_and_no_process(sandbox: LocalSandbox) -> None:
    run(sandbox, "pass")
    launcher = sandbox.launcher_pid

    def open_files() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{launcher}/fd"))

    ours, theirs = open_files()
    for _ in range(20):
        run(sandbox, "import os; os.fork()")
    # The launcher tidies up after it has answered.
    wait_until(lambda: max(open_files()[0] - ours, open_files()[1] - theirs) <= 0)
    assert sandbox.launcher_pid == launcher
    assert list(strangers(sandbox)) == []


def test_threads_take_turns(sandbox: LocalSandbox) -> None:
    found: list[bytes] = []

    def ask(number: int) -> None:
        found.append(run(sandbox, f"print({number})").stdout)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == [b"%d\n" % number for number in range(6)]


def test_a_launcher_that_is_killed_is_an_error_and_is_replaced(sandbox: LocalSandbox) -> None:
    run(sandbox, "pass")
    assert sandbox.launcher_pid is not None
    killer = threading.Timer(0.3, os.kill, (sandbox.launcher_pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(SandboxError, match="launcher"):
        run(sandbox, "import time; time.sleep(3)")
    assert run(sandbox, "print(1)").stdout == b"1\n"


CALLER = """
import sys
from treadle.actors.verify.programs.records import Command, Limits
from treadle.actors.verify.programs.tiers import make_local
sandbox = make_local(sys.argv[1])
sandbox.run(Command(argv=("/bin/true",)))
print("up", sandbox.launcher_pid, flush=True)
code = '''
import os, sys, time
for _ in range(3):
    os.fork()
try:
    os.setsid()
except OSError:
    pass
time.sleep(60)
'''
argv = ("/usr/bin/python3", "-c", code, sys.argv[2])
sandbox.run(Command(argv=argv, limits=Limits(wall_s=60.0, cpu_s=60.0)))
"""


@pytest.mark.parametrize("tier", LOCAL_TIERS)
def test_when_the_judge_is_killed_its_programs_die(tier: str) -> None:
    """The way the pool kills a verifier: SIGKILL to its process group."""
    token = os.urandom(16).hex()
    judge = subprocess.Popen(
        [sys.executable, "-c", CALLER, tier, token],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert judge.stdout is not None
    launcher = int(judge.stdout.readline().split()[1])
    wait_until(lambda: len([pid for pid in running(token) if pid != judge.pid]) >= 8)
    os.killpg(judge.pid, signal.SIGKILL)
    judge.wait(5)
    judge.stdout.close()
    wait_until(lambda: not running(token) and not os.path.exists(f"/proc/{launcher}"))


def wait_until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)


LIMITED = '''
import resource, sys
for limit, value in ((resource.RLIMIT_AS, 2**30), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_FSIZE, 2**20)):
    resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
from treadle.actors.verify.programs.records import Command, Limits
from treadle.actors.verify.programs.tiers import make_local
sandbox = make_local(sys.argv[1])
code = """
from mmap import MAP_ANON, MAP_PRIVATE, mmap
open("f", "wb").write(bytes(2**22))
mmap(-1, 2**31, MAP_PRIVATE | MAP_ANON)
print(len(open("big").read()))
"""
ended = sandbox.run(
    Command(argv=("/usr/bin/python3", "-c", code), files={"big": b"x" * 2**22}, limits=Limits(wall_s=9.0, cpu_s=9.0))
)
print(ended)
assert ended.stdout == b"%d\\n" % 2**22
'''


@pytest.mark.parametrize("tier", LOCAL_TIERS)
def test_soft_limits_of_the_judge_do_not_bind_its_programs(tier: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, tier],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[1] == resource.RLIM_INFINITY


def test_a_sandbox_that_cannot_start_a_program_raises() -> None:
    broken = LocalSandbox(
        "broken",
        {"tier": "bubblewrap", "bwrap": "/bin/false", "disable_userns": True, "toolchains": []},
        b"x" * 8,
    )
    with pytest.raises(SandboxError, match="could not be started"):
        broken.run(Command(argv=("/bin/true",)))
    broken.close()


def test_nothing_is_left_of_a_scratch_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        monkeypatch.setenv("TMPDIR", folder)
        sandbox = make_local("rlimits")
        code = "import os, time; os.makedirs('a/b'); os.chmod('a', 0); print(len(os.listdir('..')))"
        assert run(sandbox, code).stdout == b"1\n"
        sandbox.close()
        assert glob.glob(f"{folder}/*") == []


def test_limits_and_names_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="wall_s"):
        Limits(wall_s=0.0)
    with pytest.raises(ValueError, match="processes"):
        Limits(processes=-1)
    with pytest.raises(ValueError, match="empty"):
        Command(argv=())
    for name in ("../x", "a/b", "", ".", "\0"):
        with pytest.raises(ValueError, match="file name"):
            Command(argv=("x",), files={name: b""})
    assert Path(PYTHON).exists()
