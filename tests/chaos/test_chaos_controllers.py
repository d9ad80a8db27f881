"""Row 7, for runs that no client owns: clients and controllers are killed, frozen, stopped, and asked for in vain."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.chaos.book import Row, write_row
from tests.chaos.detached import HELD, Detached, credentials, importable, told
from tests.chaos.runs import WHOLE_RUN, account, clean, events_of, first_step_after, same_bits
from tests.clusters import RunningCluster, end_node, two_node_cluster
from tests.e2e.programs import TINY, WITH_PROMPTS, Program, samples_of, wait_until

pytestmark = WHOLE_RUN
REATTACH_S = 10.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    with importable(), two_node_cluster() as running:
        yield running


def reattached_s(run: Detached) -> float:
    """Seconds from the start of `treadle attach` to the controller's answer. That client is left with Ctrl-C."""
    program, began = (
        Program(words=("attach", str(run.folder)), environment=credentials(run.cluster)),
        time.monotonic(),
    )
    log = run.folder.parent / f"attach-{began:.0f}.log"
    with log.open("w+") as output, program.start_into(output) as client:
        try:
            assert wait_until(
                lambda: "attached to controller" in log.read_text() or client.poll() is not None, 300
            )
            seconds = time.monotonic() - began
            client.send_signal(signal.SIGINT)
            code = client.wait(60)
        except BaseException:
            client.kill()
            raise
    said = log.read_text()
    assert code == 130, said
    assert "the run goes on" in said
    assert "treadle attach" in said
    return seconds


def test_row_07_a_client_is_killed_and_others_attach_while_roles_are_replaced(
    cluster: RunningCluster, tmp_path: Path, undisturbed: Path
) -> None:
    with Detached(cluster, tmp_path, faults=HELD.replace("30", "120")) as run:
        run.client.kill()
        run.client.wait(60)
        seconds = [reattached_s(run) for _ in range(2)]
        second = told(cluster, "resume", str(run.folder), "--detach")
        status = told(cluster, "status", str(run.folder))
        kill_rollout_worker(run)
        ended = told(cluster, "attach", str(run.folder))
        assert second.code == 2, second
        assert f"is being run by controller {run.state['controller']['name']}" in second.complaint
        assert "detached: controller run-" in status.out
        assert f"process {run.pid} on " in status.out
        assert ended.code == 0, ended
        assert run.all_gone(), run.program.survivors()
        assert run.state["attempts"] == 1, "the run was started again"
    assert events_of(run.folder, "replaced"), "the role's death went unnoticed"
    found, made = account(run.folder), steps_of(run.folder)
    write_row(
        Row(
            row=7,
            fault="kill -9 of a detached run's client: from treadle attach to the controller's answer",
            seconds=seconds,
            budget_s=REATTACH_S,
            account=found,
            same_bits=same_bits(run.folder, undisturbed),
            figures={"steps_made_again": len(made) - len(set(made))},
        )
    )
    assert clean(found), found
    assert same_bits(run.folder, undisturbed)
    assert samples_of(run.folder) == samples_of(undisturbed)
    assert made == list(range(6))
    assert max(seconds) <= REATTACH_S, seconds


def steps_of(folder: Path) -> list[int]:
    """The steps that a run has written down, in order, those made again twice."""
    file = folder / "metrics.jsonl"
    return [row["step"] for row in map(json.loads, file.read_text().splitlines())] if file.exists() else []


def kill_rollout_worker(run: Detached) -> None:
    """The raylet of either node started it; its first client is dead by now."""
    named = [line for line in run.program.survivors() if "ray::RolloutActor" in line]
    assert named, run.program.survivors()
    os.kill(int(named[0].split()[0]), signal.SIGKILL)


def test_row_07_a_controller_is_killed_and_the_run_resumed(
    cluster: RunningCluster, tmp_path: Path, undisturbed: Path
) -> None:
    with Detached(cluster, tmp_path) as run:
        pid, killed = run.pid, time.monotonic()
        os.kill(pid, signal.SIGKILL)
        followed = run.ended()
        assert run.all_gone(), run.program.survivors()
        gone_s = time.monotonic() - killed
        later = told(cluster, "attach", str(run.folder))
        status = told(cluster, "status", str(run.folder))
        for ended in (followed, later):
            assert ended.code == 1, ended
            assert f"its process {pid} was killed or crashed" in ended.complaint
            assert "treadle resume" in ended.complaint
        assert ": killed, attempt 1" in status.out
        assert "gone without a word" in status.out
        resumed = time.time()
        ended = told(cluster, "resume", str(run.folder), "--detach")
        assert ended.code == 0, ended
        assert "rl 6/6" in ended.out
        assert run.state["attempts"] == 2
    found = account(run.folder)
    write_row(
        Row(
            row=7,
            fault="kill -9 of a detached controller, then treadle resume --detach: from the command to the first step",
            seconds=[first_step_after(run.folder, resumed)],
            account=found,
            same_bits=same_bits(run.folder, undisturbed),
            figures={"everything_gone_s": round(gone_s, 3)},
        )
    )
    assert clean(found), found
    assert same_bits(run.folder, undisturbed)
    assert samples_of(run.folder) == samples_of(undisturbed)


def test_row_07_a_frozen_controller_is_told_ended_and_replaced(
    cluster: RunningCluster, tmp_path: Path, undisturbed: Path
) -> None:
    with Detached(cluster, tmp_path) as run:
        pid = run.pid
        os.kill(pid, signal.SIGSTOP)
        status = told(cluster, "status", str(run.folder))
        followed = run.ended()
        ended = told(cluster, "resume", str(run.folder), "--detach")
        assert ": frozen, attempt 1" in status.out
        assert followed.code == 1, followed
        assert "does not answer for 60 s" in followed.complaint
        assert ended.code == 0, ended
        assert not psutil.pid_exists(pid), "the frozen controller still lives"
    assert same_bits(run.folder, undisturbed)
    assert samples_of(run.folder) == samples_of(undisturbed)
    assert clean(account(run.folder))


def test_row_07_a_detached_run_is_stopped_and_resumed(
    cluster: RunningCluster, tmp_path: Path, undisturbed: Path
) -> None:
    with Detached(cluster, tmp_path) as run:
        ended = told(cluster, "stop", str(run.folder))
        followed = run.ended()
        assert ended.code == 0, ended
        assert "after step 3 of rl, which is committed" in ended.out
        assert followed.code == 130, followed
        assert "after step 3 of rl, which is committed" in followed.complaint
        assert (run.folder / "checkpoints/rl/step-00000003/COMMITTED").exists()
        assert run.all_gone(), run.program.survivors()
        again = told(cluster, "attach", str(run.folder))
        assert (again.code, again.complaint) == (130, followed.complaint)
        assert "interrupted; nothing runs" in told(cluster, "stop", str(run.folder)).out
        ended = told(cluster, "resume", str(run.folder))
        assert ended.code == 0, ended
        assert run.state["controller"] is None
    assert same_bits(run.folder, undisturbed)
    assert samples_of(run.folder) == samples_of(undisturbed)
    assert clean(account(run.folder))


def test_stop_ends_a_run_of_this_machine_after_a_commit(tmp_path: Path, undisturbed: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "said.log"
    faults = {"TREADLE_FAILPOINTS": "learner.before_step=sleep:4@*"}
    program = Program(
        words=("run", str(TINY), WITH_PROMPTS, "checkpoint.every_steps=6", "--dir", str(folder)),
        environment=faults,
    )
    with log.open("w+") as output, program.start_into(output) as process:
        try:
            assert wait_until(lambda: bool(steps_of(folder)) or process.poll() is not None, 900)
            stopped = Program(words=("stop", str(folder))).run()
            code = process.wait(120)
        except BaseException:
            process.kill()
            raise
    assert stopped.code == 0, stopped
    assert code == 130, log.read_text()
    assert "which is committed" in stopped.out
    assert "which is committed" in log.read_text().splitlines()[-1]
    assert list((folder / "checkpoints/rl").glob("step-*/COMMITTED"))
    assert program.all_gone(), program.survivors()
    ended = Program(words=("resume", str(folder))).run()
    assert ended.code == 0, ended
    assert same_bits(folder, undisturbed)


def test_what_cannot_be_attached_to_is_said_in_one_sentence(cluster: RunningCluster, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    for words, environment, says in (
        (("attach", absent), {}, "holds no run"),
        (("attach", absent, "--address", cluster.address), {}, "has no controller absent-"),
        (("attach", absent, "--address", cluster.address), {"RAY_AUTH_TOKEN": "wrong" * 8}, "it is wrong"),
        (("attach", absent, "--address", "127.0.0.1:9"), {}, "No Ray cluster answers"),
        (("run", str(TINY), WITH_PROMPTS, "--detach", "--dir", absent), {}, "--detach needs a cluster"),
    ):
        ended = told(cluster, *words, **environment)
        assert ended.code in (1, 2), ended
        assert says in ended.complaint
        assert ended.err.count("\n") == 1, ended.err


def test_row_07_the_cluster_of_a_detached_run_dies_and_its_client_says_so(tmp_path: Path) -> None:
    with importable(), two_node_cluster() as cluster, Detached(cluster, tmp_path) as run:
        for node in reversed(cluster.nodes):
            end_node(node)
        began = time.monotonic()
        followed = run.ended()
        assert time.monotonic() - began < 60
        assert followed.code == 1, followed
        assert "The run's controller was there." in followed.complaint
        assert "--take-over" in followed.complaint
        later = told(cluster, "attach", str(run.folder))
        assert later.code == 1, later
        assert "No Ray cluster answers" in later.complaint
