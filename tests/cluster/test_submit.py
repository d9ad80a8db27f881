"""Jobs on a separately started, token-protected cluster."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time

import pytest
from tests.clusters import RunningCluster

pytestmark = pytest.mark.ray

PRELUDE = """
import json, os, sys
from pathlib import Path
from treadle.cluster.submit import JobClient, submit_recipe
from treadle.platform.errors import TreadleError
def say(**fields):
    print("SAYS " + json.dumps(fields), flush=True)
"""

PROGRAM = """
import json, os, sys
import treadle.cluster.session
from treadle.cluster.session import ClusterConfig, open_session
with open_session(ClusterConfig(address="auto")):
    import ray
    @ray.remote
    def module_file():
        import treadle.kernels.digest as digest
        return digest.__file__
    print("RESULT", json.dumps({
        "driver": treadle.cluster.session.__file__, "worker": ray.get(module_file.remote()),
        "nodes": len(ray.nodes()), "data": open("data.txt").read(), "arguments": sys.argv[1:]}))
sys.exit(int(sys.argv[1]))
"""


def _drive(cluster: RunningCluster, body: str, token: str | None = None) -> list[dict[str, object]]:
    env = {**cluster.environment(token), "DASHBOARD": cluster.dashboard, "PROGRAM": PROGRAM}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(body)],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("SAYS ")]


def test_a_job_runs_the_shipped_code_and_its_log_and_exit_code_come_back(
    running_cluster: RunningCluster,
) -> None:
    body = """
    client = JobClient(os.environ["DASHBOARD"])
    files = {"program.py": os.environ["PROGRAM"].encode(), "data.txt": b"shipped"}
    for code in (0, 3):
        job = client.submit(f"python program.py {code} 'a b'", files)
        log = []
        status = client.follow(job.id, log.append)
        say(status=status.status, exit_code=status.exit_code, log="".join(log))
    info = client._client.get_job_info(job.id)
    say(info=str(info))
    """
    good, bad, info = _drive(running_cluster, body)
    assert (good["status"], good["exit_code"]) == ("SUCCEEDED", 0), good["log"]
    assert (bad["status"], bad["exit_code"]) == ("FAILED", 3), bad["log"]
    lines = [line for line in str(good["log"]).splitlines() if line.startswith("RESULT ")]
    assert len(lines) == 1, "every piece of the log comes once"
    result = json.loads(lines[0].removeprefix("RESULT "))
    assert result["nodes"] == 2
    assert result["data"] == "shipped"
    assert result["arguments"] == ["0", "a b"]
    for module in (result["driver"], result["worker"]):
        assert "py_modules_files" in module, "the job must import the shipped wheel"
    assert running_cluster.token not in str(info["info"]), "the token could be read back from the job"


def test_a_recipe_that_fails_is_an_error_that_names_the_job(running_cluster: RunningCluster) -> None:
    body = """
    try:
        submit_recipe("no_such_setting: 1\\n", name="broken", address=os.environ["DASHBOARD"], quiet=True)
    except TreadleError as error:
        say(text=str(error), kind=type(error).__name__)
    """
    (answer,) = _drive(running_cluster, body)
    assert answer["kind"] == "ClusterError"
    assert "failed with exit code" in str(answer["text"])
    assert "ray job logs" in str(answer["text"])


@pytest.mark.parametrize(("token", "words"), [("", "none is set"), ("wrong" * 8, "it is wrong")])
def test_a_missing_or_wrong_token_and_a_dead_dashboard_are_one_sentence(
    running_cluster: RunningCluster, token: str, words: str
) -> None:
    body = """
    for address in (os.environ["DASHBOARD"], "127.0.0.1:1"):
        try:
            JobClient(address)
        except TreadleError as error:
            say(text=str(error), kind=type(error).__name__)
    """
    start = time.monotonic()
    refused, dead = _drive(running_cluster, body, token)
    assert time.monotonic() - start < 15
    assert words in str(refused["text"])
    assert "No Ray dashboard answers at http://127.0.0.1:1" in str(dead["text"])
    assert "\n" not in str(refused["text"]) + str(dead["text"])
