"""Workers that are forked from a template: what they inherit, and what happens without one."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from treadle.actors.learner.config import GroupConfig
from treadle.actors.preload import preload
from treadle.actors.rollout.config import RolloutConfig
from treadle.cluster import warm_start
from treadle.platform.records import RoleSpec

pytestmark = pytest.mark.processes

WORKER = """
import json, os, signal, sys
import numpy
print(json.dumps({
    "argv": sys.argv, "name": __name__, "group": os.getpgrp(),
    "folder": os.getcwd(), "pid": os.getpid(), "parent": os.getppid(),
    "said": os.environ.get("SAID"), "secret": os.environ.get("SECRET"), "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "blocked": sorted(int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "drawn": float(numpy.random.random()), "path": sys.path[0],
    "score": open("/proc/self/oom_score_adj").read().strip(),
    "interruptible": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
}), flush=True)
"""


@pytest.fixture
def executable(tmp_path: Path) -> Iterator[list[str]]:
    """The command that starts a worker from a template which has imported numpy."""
    with warm_start.template(tmp_path, ["json", "numpy"]) as words:
        yield shlex.split(words)


@pytest.fixture
def worker(tmp_path: Path) -> str:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return str(script)


def started(executable: list[str], *command: str, **options: object) -> dict[str, object]:
    """What the worker says of itself: its output goes where its shim's would."""
    with subprocess.Popen([*executable, *command], stdout=subprocess.PIPE, text=True, **options) as shim:  # type: ignore[call-overload]
        out, _ = shim.communicate(timeout=60)
    assert shim.returncode == 0
    said: dict[str, object] = json.loads(out)
    return said


def test_a_forked_worker_has_the_surroundings_that_it_would_have_been_executed_with(
    executable: list[str], worker: str, tmp_path: Path
) -> None:
    elsewhere, modules = tmp_path / "elsewhere", tmp_path / "modules"
    elsewhere.mkdir()

    def surround() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        os.nice(3)
        Path("/proc/self/oom_score_adj").write_text("700")

    said = started(
        executable,
        *(worker, "--worker-id", "a b"),
        cwd=elsewhere,
        env={"SAID": "hello", "PYTHONPATH": str(modules)},
        preexec_fn=surround,
    )
    assert said["argv"] == [worker, "--worker-id", "a b"]
    assert (said["name"], said["folder"], said["said"]) == ("__main__", str(elsewhere), "hello")
    assert (said["blocked"], said["interruptible"]) == ([signal.SIGINT], True)
    assert said["nice"] == os.getpriority(os.PRIO_PROCESS, 0) + 3
    assert said["score"] == "700"
    assert said["path"] == str(modules)


def test_a_worker_has_no_variable_of_the_template_and_draws_numbers_of_its_own(
    tmp_path: Path, worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "of the driver")
    with warm_start.template(tmp_path, ["numpy"]) as words:
        first, second = (started(shlex.split(words), worker, env={}) for _ in range(2))
    assert first["secret"] is None
    assert first["parent"] == second["parent"] != os.getpid()
    assert first["pid"] != second["pid"]
    assert (first["group"], second["group"]) == (first["pid"], second["pid"]), (
        "one's end would be the other's"
    )
    assert first["drawn"] != second["drawn"]


def test_a_worker_that_outlives_ray_ends_with_the_template(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    with warm_start.template(tmp_path, ["json"]) as words:
        shim = subprocess.Popen([*shlex.split(words), str(script)], stdout=subprocess.PIPE, text=True)
        assert shim.stdout is not None
        worker = psutil.Process(int(shim.stdout.readline()))
        assert worker.is_running()
    worker.wait(10)
    shim.communicate(timeout=10)


def test_variables_that_an_import_sets_reach_the_worker(
    tmp_path: Path, worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sets_a_variable.py").write_text("import os\nos.environ['SAID'] = 'imported'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with warm_start.template(
        tmp_path, ["sets_a_variable", "no_such_module", "json:no_such_function"]
    ) as words:
        assert started(shlex.split(words), worker, env={})["said"] == "imported"
        assert started(shlex.split(words), worker, env={"SAID": "mine"})["said"] == "mine"
    log = (tmp_path / warm_start.LOG).read_text()
    assert "No module named 'no_such_module'" in log
    assert "no_such_function" in log


def test_a_template_that_imports_ray_refuses_and_workers_start_by_themselves(
    tmp_path: Path, worker: str
) -> None:
    with warm_start.template(tmp_path, ["ray"]) as words:
        said = started(shlex.split(words), worker, env={})
    assert "imports ray" in (tmp_path / warm_start.LOG).read_text()
    assert said["argv"] == [worker]


def test_nothing_that_roles_preload_imports_ray() -> None:
    for backend in ("deepspeed", "torch"):
        names = preload(RolloutConfig(), GroupConfig(backend=backend))
        code = f"""
            from treadle.cluster.template import load
            load({names!r})
            import sys
            print("torch" in sys.modules, "transformers" in sys.modules, "deepspeed" in sys.modules)
            """
        ran = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.split() == ["True", "True", str(backend == "deepspeed")], ran
        assert "Traceback" not in ran.stderr


def test_callers_that_leave_or_talk_nonsense_do_not_end_the_template(
    executable: list[str], worker: str, tmp_path: Path
) -> None:
    for nonsense in (b"", b"\x00\x00\x00\x09{}", b"\x00"):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(tmp_path / warm_start.SOCKET))
            caller.sendall(nonsense)
    assert started(executable, worker, env={})["argv"] == [worker]


def test_workers_outlive_a_killed_template_and_the_next_one_starts_by_itself(
    executable: list[str], tmp_path: Path, worker: str
) -> None:
    lasting = tmp_path / "lasting.py"
    lasting.write_text("import os, sys\nprint(os.getpid(), os.getppid(), flush=True)\nsys.stdin.read()\n")
    with subprocess.Popen(
        [*executable, str(lasting)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as shim:
        assert shim.stdout is not None
        pid, parent = map(int, shim.stdout.readline().split())
        os.kill(parent, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(parent)], timeout=10)
        assert psutil.pid_exists(pid)
        said = started(executable, worker, env={})
        assert said["parent"] != parent
        shim.communicate(timeout=30)  # closes its input


def test_a_template_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = f"""
        import time
        from pathlib import Path
        from treadle.cluster.warm_start import template
        with template(Path({str(tmp_path)!r}), ["json"]):
            print("up", flush=True)
            time.sleep(600)
        """
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    with driver:
        assert driver.stdout is not None
        driver.stdout.readline()
        found = psutil.Process(driver.pid).children()
        driver.kill()
    gone, alive = psutil.wait_procs(found, timeout=10)
    assert (len(gone), alive) == (1, [])


def test_a_role_with_a_gpu_is_never_forked() -> None:
    assert warm_start.pays([RoleSpec(role="rollout", count=1, cpus=1)])
    assert not warm_start.pays(
        [RoleSpec(role="verify", count=1, cpus=1), RoleSpec(role="learner", count=1, gpus=1)]
    )
    assert preload(RolloutConfig(engine="vllm"), GroupConfig()) == ()
