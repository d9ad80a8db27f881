"""Rows 9, 15 and 17: the cluster is gone with its disks, commits in the bucket are damaged, the bucket fails."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.chaos.book import Row, write_row
from tests.chaos.runs import PATIENT, WHOLE_RUN, Chaos, account, clean, events_of, first_step_after, same_bits
from tests.clusters import Node, cluster_of, end_node
from tests.e2e.buckets import MIRRORED, Bucket, end, kinds, lose_a_run, made, mirrored_step, served_bucket
from tests.e2e.programs import (
    TINY,
    WITH_PROMPTS,
    Ended,
    Program,
    patiently,
    samples_of,
    summary_of,
    wait_until,
)

from treadle.platform.checkpoints import CheckpointMeta, Checkpoints, verify
from treadle.platform.metric_names import TIMING_STEP
from treadle.platform.mirror import Commit, Mirror
from treadle.workflows.mirroring import rebuild
from treadle.workflows.outputs import outputs_of

pytestmark = [*WHOLE_RUN, pytest.mark.s3]


@pytest.fixture(scope="module")
def served() -> Iterator[Bucket]:
    """The server of all tests of this file."""
    with served_bucket() as found:
        yield found


@pytest.fixture(scope="module")
def bucket(served: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    """Of a run that is gone."""
    lose_a_run(tmp_path_factory.mktemp("lost") / "run", served)
    return served


def test_row_09_a_cluster_is_gone_with_its_disks_and_a_fresh_one_continues(
    tmp_path: Path, undisturbed: Path, served: Bucket
) -> None:
    """Head and second node, without fault tolerance; the run's folder goes with them."""
    folder, url = tmp_path / "run", f"{served.url}-row-09"
    with cluster_of(Node(cpus=4), Node(cpus=4)) as cluster:
        words = ("run", str(TINY), WITH_PROMPTS, *PATIENT, f"{MIRRORED}{url}", "--dir", str(folder))
        program = Program(
            words=(*words, "--address", cluster.address),
            environment={**cluster.environment(), "TREADLE_FAILPOINTS": "driver.after_lease=sleep:600@5"},
        )
        process = program.start()
        try:
            assert wait_until(lambda: mirrored_step(folder) == 4 or process.poll() is not None, 900)
            assert process.poll() is None, process.communicate()
        finally:
            for node in cluster.nodes:
                end_node(node)
            end(process, program.mark)
    shutil.rmtree(folder)
    with cluster_of(Node(cpus=4), Node(cpus=4)) as fresh:
        resumed = time.time()
        words = ("resume", url, "--dir", str(folder), "--address", fresh.address)
        _, ended = patiently(*words, **fresh.environment())
    assert ended.code == 0, ended
    found = account(folder)
    seconds, (fetched,) = first_step_after(folder, resumed), events_of(folder, "mirror_fetched")
    write_row(
        Row(
            row=9,
            fault="all nodes die and the run folder is deleted: from treadle resume URL to the first step",
            seconds=[seconds],
            budget_s=60.0,
            account=found,
            same_bits=same_bits(folder, undisturbed),
            figures={
                "finished steps made again": 4 - fetched["step"],
                "fetched and verified within s": fetched["seconds"],
            },
        )
    )
    assert clean(found), found
    assert same_bits(folder, undisturbed)
    assert samples_of(folder) == samples_of(undisturbed)


def shard_of(mirror: Mirror, commit: Commit) -> str:
    """The object with the optimiser's state."""
    return next(f.path for name, f in mirror.manifest(commit).items() if name.endswith(".safetensors"))


def truncated(mirror: Mirror, newest: Commit) -> None:
    path = shard_of(mirror, newest)
    mirror.store.write_bytes(path, mirror.store.read_bytes(path)[:-1])


def flipped(mirror: Mirror, newest: Commit) -> None:
    path = shard_of(mirror, newest)
    data = bytearray(mirror.store.read_bytes(path))
    data[len(data) // 2] ^= 1
    mirror.store.write_bytes(path, bytes(data))


def without_shard(mirror: Mirror, newest: Commit) -> None:
    mirror.store.remove(shard_of(mirror, newest))


def without_manifest(mirror: Mirror, newest: Commit) -> None:
    mirror.store.remove(newest.manifest)


DAMAGES: dict[Callable[[Mirror, Commit], None], str] = {
    truncated: "bytes, not",
    flipped: "CRC-32 does not match",
    without_shard: "is missing",
    without_manifest: "manifest.json is missing",
}


def test_row_15_a_damaged_commit_is_passed_over_for_the_one_before(
    tmp_path: Path, undisturbed: Path, bucket: Bucket
) -> None:
    seconds, lost, accounts = [], [], []
    for damage, reason in DAMAGES.items():
        folder, url = tmp_path / damage.__name__, bucket.copy(damage.__name__)
        mirror = Mirror(url, timeout_s=10)
        newest = mirror.commits()[-1]
        damage(mirror, newest)
        resumed = time.time()
        _, ended = patiently("resume", url, "--dir", str(folder))
        assert ended.code == 0, ended
        seconds.append(first_step_after(folder, resumed))
        (told,) = events_of(folder, "mirror_passed_over")
        assert reason in told["message"], told
        assert f"{newest} of {url} is passed over" in ended.out
        lost.append(newest.step - events_of(folder, "mirror_fetched")[0]["step"])
        accounts.append(account(folder))
        assert same_bits(folder, undisturbed), damage.__name__
        assert samples_of(folder) == samples_of(undisturbed), damage.__name__
    write_row(
        Row(
            row=15,
            fault=f"a commit in the bucket is damaged: {', '.join(d.__name__ for d in DAMAGES)}",
            seconds=seconds,
            account=accounts[-1],
            same_bits=True,
            figures={"steps made again": max(lost), "verifying, GiB/s": verifying_gib_per_s(tmp_path)},
        )
    )
    assert all(clean(found) for found in accounts), accounts
    assert set(lost) == {2}


def verifying_gib_per_s(folder: Path) -> float:
    """Of a checkpoint of 256 MiB in four shards, in the page cache."""
    checkpoints = Checkpoints(folder / "large")
    shards = Path(checkpoints.begin("rl", 1).removeprefix("file://"))
    shards.mkdir(parents=True)
    for number in range(4):
        (shards / f"{number}.safetensors").write_bytes(os.urandom(2**26))
    ref = checkpoints.commit("rl", CheckpointMeta(step=1, cursor=0))
    began = time.perf_counter()
    verify(ref.url)
    return round(0.25 / (time.perf_counter() - began), 2)


STEPS = 12
OUTAGES = ("503", "403", "stall")
"""Beyond a request's own attempts. A 500 for every second request stays within them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A mirrored run of twelve steps and what became of it."""

    chaos: Chaos
    url: str

    @property
    def step_s(self) -> float:
        """The median of the steps between the first commit and the last step."""
        return statistics.median(self.chaos.metrics(TIMING_STEP)[3:-1])


def played(folder: Path, bucket: Bucket, fault: str) -> Played:
    """A run whose bucket fails from the first commit on until the last step is made and the alarm, if there is one, was
    told."""
    url, faults = f"{bucket.url}-row-17-{fault}", bucket.faults
    settings = (f"stages.rl.steps={STEPS}", f"{MIRRORED}{url}", "checkpoint.mirror_timeout_s=2")
    program = Program(words=("run", str(TINY), WITH_PROMPTS, *PATIENT, *settings, "--dir", str(folder)))
    began, process = time.monotonic(), program.start()
    passed = 0

    def every_second(method: str, path: str) -> bool:
        nonlocal passed
        passed += 1
        return passed % 2 == 0

    try:
        assert wait_until(lambda: mirrored_step(folder) >= 2 or process.poll() is not None, 900)
        faults.concern = every_second if fault == "500" else lambda method, path: True
        faults.always = fault
        assert wait_until(lambda: made(folder, STEPS) or process.poll() is not None, 900)
        if fault in OUTAGES:
            assert wait_until(lambda: "mirror_failing" in kinds(folder), 120)
        faults.always = ""
        out, err = process.communicate(timeout=300)
    except BaseException:
        process.kill()
        raise
    finally:
        faults.always = ""
    assert process.returncode == 0, (out, err)
    assert program.all_gone(), program.survivors()
    ended = Ended(code=0, out=out, err=err, wall_s=time.monotonic() - began)
    return Played(chaos=Chaos(folder=folder, ended=ended, faults={}), url=url)


def test_row_17_the_bucket_fails_and_no_step_waits_for_it(tmp_path: Path, bucket: Bucket) -> None:
    fetching_through_faults(bucket, tmp_path)
    bucket.faults.stall_s = 5.0
    quiet = played(tmp_path / "none", bucket, "")
    ratios, lost = {}, 0
    for fault in ("500", *OUTAGES):
        disturbed = played(tmp_path / fault, bucket, fault)
        folder = disturbed.chaos.folder
        ratios[f"step time with {fault}, ratio"] = round(disturbed.step_s / quiet.step_s, 3)
        assert kinds(folder).count("mirror_failing") == (fault in OUTAGES), fault
        assert summary_of(folder)["mirror"]["complete"], fault
        assert same_bits(folder, quiet.chaos.folder), fault
        assert clean(account(folder)), fault
        again = rebuild(disturbed.url, tmp_path / f"{fault}-again")
        lost += STEPS - outputs_of(again)["rl"].steps
    write_row(
        Row(
            row=17,
            fault="the bucket answers 500, 503, 403, nothing, half a body, or 404 after a listing",
            account=account(quiet.chaos.folder),
            same_bits=True,
            figures={**ratios, "steps lost": lost},
        )
    )
    assert lost == 0
    assert max(ratios.values()) < 1.5


def fetching_through_faults(bucket: Bucket, folder: Path) -> None:
    """Half a body is read again; an object that is listed and not found costs its commit, and that is told."""
    url = bucket.copy("cut")
    bucket.faults.concern = lambda method, path: method == "GET" and path.endswith(".safetensors")
    bucket.faults.due = ["cut"]
    whole = rebuild(url, folder / "cut")
    assert bucket.faults.due == []
    assert mirrored_step(whole.path) == 4
    url = bucket.copy("gone")
    gone = shard_of(mirror := Mirror(url, timeout_s=10), mirror.commits()[-1])
    bucket.faults.concern = lambda method, path: path.endswith(f"{url.removeprefix('s3:/')}/{gone}")
    bucket.faults.always = "404"
    before = rebuild(url, folder / "gone")
    bucket.faults.always = ""
    assert mirrored_step(before.path) == 2
