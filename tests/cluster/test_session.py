"""Opening and closing Ray. Every session runs in a process of its own, as a program would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.clusters import RunningCluster, clean_environment

from treadle.cluster.environment import given_token, prepare_embedded, prepare_environment
from treadle.cluster.reach import check_cluster, check_dashboard, split_address
from treadle.cluster.session import ClusterConfig, logical_cpus
from treadle.platform.errors import ClusterError, ConfigError
from treadle.platform.records import RoleSpec

PRELUDE = """
import json, os, sys, time
from treadle.cluster.session import ClusterConfig, open_session
from treadle.platform.errors import TreadleError
from treadle.platform.records import RoleSpec
def say(**fields):
    print(json.dumps(fields), flush=True)
"""


def _run(body: str, env: dict[str, str], timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(body)],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@contextlib.contextmanager
def _started(body: str, env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], dict[str, object]]]:
    """A program that prints one JSON line when it is ready, and that line."""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(body)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


# Ray's two agents per node report a killed node to its dead GCS for 60 s (fixed in Ray 2.56), then end.
AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}

EMBEDDED = """
import subprocess
start = time.monotonic()
with open_session(ClusterConfig(temp_dir=os.environ.get("SESSION_PARENT", ""))) as session:
    opened_s = time.monotonic() - start
    import ray
    @ray.remote(num_cpus=0)
    class Role:
        def __init__(self):
            # As the verifiers' processes do: die with the one that started them.
            code = "import ctypes, time; ctypes.CDLL(None).prctl(1, 9); time.sleep(600)"
            self.child = subprocess.Popen([sys.executable, "-c", code])
        def facts(self):
            return os.getpid(), self.child.pid, os.nice(0)
    role = Role.remote()
    pid, child, nice = ray.get(role.facts.remote())
    folder = ray._private.worker.global_worker.node.get_session_dir_path()
    say(opened_s=opened_s, role=pid, child=child, nice=nice, folder=folder,
        token=os.environ["RAY_AUTH_TOKEN"], dashboard=session.dashboard_url)
    %s
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return clean_environment(tmp_path)


@pytest.mark.ray
def test_an_embedded_session_is_private_protected_and_leaves_nothing(
    env: dict[str, str], tmp_path: Path
) -> None:
    done = _run(EMBEDDED % "pass", env)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[0])
    assert len(facts["token"]) == 64
    assert facts["nice"] == 0
    assert facts["opened_s"] < 30
    assert not Path(facts["folder"]).parent.exists()
    assert not psutil.pid_exists(facts["role"])
    assert not (tmp_path / ".ray" / "auth_token").exists(), "the home folder was used for the token"


@pytest.mark.ray
@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM"])
def test_a_session_closes_itself_when_the_program_is_asked_to_end(env: dict[str, str], end: str) -> None:
    with _started(EMBEDDED % "time.sleep(600)", env) as (process, facts):
        family = _family(process.pid)
        os.kill(process.pid, getattr(signal, end))
        assert process.wait(timeout=60) != 0
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, "processes outlived their driver"
    assert not Path(str(facts["folder"])).parent.exists()


@pytest.mark.ray
def test_a_session_closes_itself_when_the_program_fails(env: dict[str, str]) -> None:
    done = _run(EMBEDDED % "raise ValueError('broken on purpose')", env)
    assert "broken on purpose" in done.stderr
    facts = json.loads(done.stdout.splitlines()[0])
    assert not psutil.pid_exists(facts["role"])
    assert not Path(facts["folder"]).parent.exists()


@pytest.fixture
def parent() -> Iterator[str]:
    """A folder for sessions, with a short path; in /tmp any other session would tidy up behind the killed one."""
    with tempfile.TemporaryDirectory(prefix="tsp", dir="/tmp") as folder:
        yield folder


@pytest.mark.ray
def test_a_killed_program_leaves_no_process_and_its_folder_goes_with_the_next(
    env: dict[str, str], parent: str
) -> None:
    env = {**env, "SESSION_PARENT": parent}
    with _started(EMBEDDED % "time.sleep(600)", env) as (process, facts):
        family = _family(process.pid)
        assert {facts["role"], facts["child"]} <= {member.pid for member in family}
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=10)
        agents = [member for member in family if member.name() in AGENTS]
        _, alive = psutil.wait_procs([member for member in family if member not in agents], timeout=25)
        assert not alive, "processes outlived their driver"
    folder = Path(str(facts["folder"])).parent
    assert folder.exists()
    assert folder.parent == Path(parent)
    assert _run(f"with open_session(ClusterConfig(temp_dir={parent!r})): pass", env).returncode == 0
    assert not folder.exists()
    for agent in agents:
        agent.kill()


ATTACH = """
start = time.monotonic()
try:
    with open_session(ClusterConfig(address=os.environ["CLUSTER"])) as session:
        import ray
        say(nodes=len(ray.nodes()), embedded=session.embedded, seconds=time.monotonic() - start)
except TreadleError as error:
    say(error=str(error), kind=type(error).__name__, seconds=time.monotonic() - start)
"""


def _attach(address: str, env: dict[str, str]) -> dict[str, object]:
    done = _run(ATTACH, {**env, "CLUSTER": address})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.ray
def test_a_running_cluster_is_attached_to_with_its_token(running_cluster: RunningCluster) -> None:
    answer = _attach(running_cluster.address, running_cluster.environment())
    assert answer["nodes"] == 2
    assert answer["embedded"] is False
    token_file = running_cluster.folder / "token"
    token_file.write_text(running_cluster.token + "\n")
    env = {**running_cluster.environment(token=""), "RAY_AUTH_TOKEN_PATH": str(token_file)}
    assert _attach(running_cluster.address, env)["nodes"] == 2


@pytest.mark.ray
@pytest.mark.parametrize(
    ("token", "words"),
    [("", "asks for a token and none is set"), ("wrong" * 8, "refuses the token: it is wrong")],
)
def test_a_missing_or_wrong_token_is_one_sentence_at_once(
    running_cluster: RunningCluster, token: str, words: str
) -> None:
    answer = _attach(running_cluster.address, running_cluster.environment(token=token))
    assert answer["kind"] == "ClusterError"
    assert words in str(answer["error"])
    assert "cluster.token_file" in str(answer["error"])
    assert "\n" not in str(answer["error"])
    assert float(str(answer["seconds"])) < 15
    with pytest.raises(ClusterError, match=words):
        check_dashboard(running_cluster.dashboard, token, 10.0)


@pytest.mark.ray
def test_the_dashboard_s_port_is_not_mistaken_for_the_cluster(running_cluster: RunningCluster) -> None:
    address = running_cluster.dashboard.removeprefix("http://")
    with pytest.raises(ClusterError, match="does not answer like a Ray cluster"):
        check_cluster(address, running_cluster.token, 5.0)


def test_a_dead_address_is_one_sentence_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(
        ClusterError, match=r"No Ray cluster answers at cluster.address=127.0.0.1:1 .*refused"
    ):
        check_cluster("127.0.0.1:1", "t", 5.0)
    with pytest.raises(ClusterError, match="No Ray dashboard answers"):
        check_dashboard("http://127.0.0.1:1", "t", 5.0)
    assert time.monotonic() - start < 5


def test_something_that_never_answers_is_given_up_at_the_deadline() -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(ClusterError, match="does not answer like a Ray cluster"):
        check_cluster(f"127.0.0.1:{port}", "t", 1.0)
    with pytest.raises(ClusterError, match="No Ray dashboard answers"):
        check_dashboard(f"http://127.0.0.1:{port}", "t", 1.0)
    assert time.monotonic() - start < 8
    silent.close()


@pytest.mark.parametrize("address", ["host", "host:port", "host:0", "http://host:1", ":1", "host:70000"])
def test_addresses_that_cannot_be_are_refused_before_anything_starts(address: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.address"):
        ClusterConfig(address=address).check()


def test_addresses_are_split() -> None:
    assert split_address("10.0.0.1:6379") == ("10.0.0.1", 6379)
    assert split_address("[::1]:6379") == ("::1", 6379)
    ClusterConfig(address="auto").check()
    ClusterConfig().check()


@pytest.mark.parametrize(
    "config",
    [
        ClusterConfig(num_cpus=-1),
        ClusterConfig(object_store_memory_bytes=1000),
        ClusterConfig(connect_deadline_s=0),
        ClusterConfig(placement_deadline_s=-1),
    ],
)
def test_settings_that_cannot_be_are_named(config: ClusterConfig) -> None:
    with pytest.raises(ConfigError, match="cluster\\."):
        config.check()


def test_all_roles_fit_the_logical_cpus_of_two_cores() -> None:
    specs = [RoleSpec(role="rollout", count=4, cpus=1.0), RoleSpec(role="learner", count=2, cpus=3.5)]
    assert logical_cpus(specs) >= 11 + 1
    assert logical_cpus([]) >= (os.cpu_count() or 1)


def test_the_environment_is_prepared_without_ray_and_keeps_what_is_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    modules = "treadle.cluster.session, treadle.cluster.submit, treadle.cluster.environment"
    code = f"import sys, {modules}; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setenv("RAY_worker_niceness", "5")
    monkeypatch.delenv("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", raising=False)
    prepare_environment()
    assert os.environ["RAY_worker_niceness"] == "5"  # noqa: SIM112 Ray spells it so
    assert os.environ["RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"] == "1"


def test_a_token_file_wins_over_the_environment_and_must_be_readable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from the environment")
    assert given_token() == "from the environment"
    path = tmp_path / "token"
    with pytest.raises(ClusterError, match="cannot be read"):
        prepare_environment(str(path))
    path.write_text(" \n")
    with pytest.raises(ClusterError, match="is empty"):
        prepare_environment(str(path))
    path.write_text("from the file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")
    prepare_environment(str(path))
    assert given_token() == "from the file"


def test_an_embedded_cluster_makes_a_token_only_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    prepare_embedded()
    assert os.environ["RAY_AUTH_TOKEN"] == "given"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    prepare_embedded()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_AUTH_MODE"] == "token"
