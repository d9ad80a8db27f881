"""The same recipe on an embedded Ray, attached to a running cluster, and as one of its jobs."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.clusters import RunningCluster, two_node_cluster
from tests.e2e.programs import (
    REPOSITORY,
    TINY,
    WITH_PROMPTS,
    Ended,
    Program,
    samples_of,
    summary_of,
    wait_until,
)

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    """Two token-protected nodes that can import the tests' verifier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        with two_node_cluster() as running:
            yield running


def on(cluster: RunningCluster, *words: str, token: str | None = None) -> tuple[Program, Ended]:
    """A command whose only credential is this token, the cluster's by default."""
    given = cluster.token if token is None else token
    environment = {"HOME": str(cluster.folder), **({"RAY_AUTH_TOKEN": given} if given else {})}
    program = Program(words=words, environment=environment)
    return program, program.run()


def attached(cluster: RunningCluster, folder: Path, *settings: str) -> tuple[str, ...]:
    where = ("--address", cluster.address, "--dir", str(folder))
    return ("run", str(TINY), WITH_PROMPTS, *settings, *where)


def submitted(cluster: RunningCluster, folder: Path, *settings: str) -> tuple[str, ...]:
    where = ("--address", cluster.dashboard, "--dir", str(folder))
    return ("submit", str(TINY), WITH_PROMPTS, *settings, *where)


def assert_same_run(one: Path, other: Path) -> None:
    mine, theirs = summary_of(one), summary_of(other)
    assert mine["eval"] == theirs["eval"]
    assert mine["weights_digest"] == theirs["weights_digest"]
    assert mine["samples"] == theirs["samples"]
    assert samples_of(one) == samples_of(other)


def test_attached_to_a_cluster_the_run_is_the_same(
    cluster: RunningCluster, undisturbed: Path, tmp_path: Path
) -> None:
    program, ended = on(cluster, *attached(cluster, tmp_path / "run"))
    assert ended.code == 0, ended
    assert_same_run(tmp_path / "run", undisturbed)
    assert program.all_gone(), program.survivors()


def test_a_detached_run_outlives_its_client_and_another_one_attaches_to_it(
    cluster: RunningCluster, undisturbed: Path, tmp_path: Path
) -> None:
    folder, environment = tmp_path / "run", {"HOME": str(cluster.folder), "RAY_AUTH_TOKEN": cluster.token}
    held = "learner.before_step=sleep:20@3"  # so that a client which comes back finds it still running
    program = Program(
        words=(*attached(cluster, folder), "--detach"),
        environment={**environment, "TREADLE_FAILPOINTS": held},
    )
    with (tmp_path / "client.log").open("w+") as log, program.start_into(log) as client:
        assert wait_until(lambda: steps_of(folder) >= 2 or client.poll() is not None, 600), log.name
        client.kill()
    assert len(program.survivors()) > 5, "the run's processes do not have the mark"
    began = time.time()
    _, ended = on(cluster, "attach", str(folder))
    assert ended.code == 0, ended
    assert "attached to controller run-" in ended.out
    assert "rl 6/6" in ended.out
    assert_same_run(folder, undisturbed)
    state = json.loads((folder / "run.json").read_text())
    assert (state["state"], state["attempts"]) == ("finished", 1)
    assert state["ended_unix_s"] > began, "it had ended before the second client came"
    assert program.all_gone(30), program.survivors()


def steps_of(folder: Path) -> int:
    """Steps that a run has written down."""
    file = folder / "metrics.jsonl"
    return file.read_text().count('"stage":"rl"') if file.exists() else 0


def test_while_it_runs_prometheus_finds_its_figures(cluster: RunningCluster, tmp_path: Path) -> None:
    environment = {"HOME": str(cluster.folder), "RAY_AUTH_TOKEN": cluster.token}
    program = Program(words=attached(cluster, tmp_path / "run"), environment=environment)
    figures: set[tuple[str, str]] = set()
    with program.start() as process:
        while process.poll() is None:
            with urllib.request.urlopen(cluster.metrics, timeout=10) as answer:
                text = answer.read().decode()
            figures |= set(re.findall(r'^(ray_treadle_\w+)\{.*stage="(\w+)"', text, re.MULTILINE))
            time.sleep(1)
        assert process.returncode == 0, process.communicate()
    assert {("ray_treadle_reward_mean", "rl"), ("ray_treadle_staleness_max", "rl")} <= figures


def test_as_a_job_the_run_is_the_same_and_its_log_is_followed(
    cluster: RunningCluster, undisturbed: Path, tmp_path: Path
) -> None:
    _, ended = on(cluster, *submitted(cluster, tmp_path / "run"))
    assert ended.code == 0, ended
    assert_same_run(tmp_path / "run", undisturbed)
    assert "rl 6/6" in ended.out
    assert cluster.token not in ended.out + ended.err


def test_a_job_that_fails_hands_its_exit_code_and_its_sentence_on(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    _, ended = on(cluster, *submitted(cluster, tmp_path))
    assert ended.code == 2, ended  # the job's own: a folder it will not write to
    assert "not empty and holds no run" in ended.out
    assert "exit code 2" in ended.complaint


@pytest.mark.parametrize(("token", "said"), [("", "none is set"), ("wrong" * 8, "it is wrong")])
@pytest.mark.parametrize("way", [attached, submitted])
def test_without_the_right_token_one_sentence_says_so(
    cluster: RunningCluster,
    tmp_path: Path,
    way,  # type: ignore[no-untyped-def]
    token: str,
    said: str,
) -> None:
    program, ended = on(cluster, *way(cluster, tmp_path / "run"), token=token)
    assert ended.code == 1
    assert said in ended.complaint
    assert "RAY_AUTH_TOKEN" in ended.complaint
    assert ended.err.count("\n") == 1, ended.err
    assert refusal_s(tmp_path / "run", ended) < 15
    assert program.all_gone(), program.survivors()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("rollout.cpus=64",), "64"),
        (("rollout.device=cuda", "rollout.gpus=1", "rollout.workers=3"), "GPU"),
        (("learner.accelerator=A100",), "A100"),
    ],
)
def test_an_impossible_placement_is_refused_with_its_reason(
    cluster: RunningCluster, tmp_path: Path, settings: tuple[str, ...], said: str
) -> None:
    program, ended = on(cluster, *attached(cluster, tmp_path / "run", *settings))
    assert ended.code == 1
    assert ended.complaint.startswith("treadle: PlacementError: ")
    assert said in ended.complaint
    assert ended.err.count("\n") == 1, ended.err
    assert refusal_s(tmp_path / "run", ended) < 15
    assert program.all_gone(), program.survivors()


def refusal_s(folder: Path, ended: Ended) -> float:
    """Seconds from the first contact with the cluster to the end: importing libraries is the machine's matter."""
    if not folder.exists():
        return 0.0 if ended.code else ended.wall_s
    state = json.loads((folder / "run.json").read_text())
    assert state["state"] == "failed"
    return float(state["ended_unix_s"] - state["started_unix_s"])
