"""Calls over a network that loses requests and answers: Ray's own fault injection, on a cluster of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.clusters import clean_environment

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
PUSH = "CoreWorkerService.grpc_client.PushTask"
LOST = {"num_failures": 4, "req_failure_prob": 40, "resp_failure_prob": 60, "in_flight_failure_prob": 0}
"""Requests and answers at random, four in all: one more in a row, and a call is given up."""
PROGRAM = """
import asyncio, json, sys, ray
from treadle.actors.calls import call_once, once
from ray.exceptions import ActorUnavailableError

@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"health": 1})
class Ordered:
    def __init__(self): self.done = []
    @once
    def do(self, number): self.done.append(number); return number
    def seen(self): return self.done

@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)
class Concurrent:
    def __init__(self): self.done = []
    @once
    async def do(self, number): self.done.append(number); return number
    async def seen(self): return self.done

async def use(kind):
    actor = kind.remote()
    answers = [await call_once(actor, "do", number) for number in range(12)]
    return answers, await actor.seen.remote()

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
kind = {"ordered": Ordered, "concurrent": Concurrent}[sys.argv[2]]
print(json.dumps(asyncio.run(use(kind))))
"""


@pytest.fixture
def short_folder() -> Iterator[str]:
    """Ray's sockets have long names."""
    with tempfile.TemporaryDirectory(prefix="trl", dir="/tmp") as folder:
        yield folder


@pytest.mark.parametrize("kind", ["ordered", "concurrent"])
def test_calls_over_a_line_that_loses_them_are_carried_out_once_each(
    kind: str, tmp_path: Path, short_folder: str
) -> None:
    environment = clean_environment(tmp_path) | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_testing_rpc_failure": json.dumps({PUSH: LOST}),
    }
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, short_folder, kind],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stderr.count("the actor could not be reached") == 4
    answers, seen = json.loads(ended.stdout.splitlines()[-1])
    assert answers == list(range(12))
    assert seen == list(range(12))
