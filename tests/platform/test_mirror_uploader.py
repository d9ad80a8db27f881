"""The uploader: commits reach the mirror in the background, whatever the store behind it does."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.platform.object_store import Faults, s3_server

from treadle.platform.errors import ConfigError, FencedError, StorageError
from treadle.platform.mirror import Mirror
from treadle.platform.mirror_reader import fetch_newest
from treadle.platform.mirror_uploader import MirrorUploader, Offer, Progress
from treadle.platform.mirror_writer import MirrorWriter, Source
from treadle.platform.records import Json
from treadle.platform.storage import S3_ATTEMPTS, open_store

TIMEOUT_S = 1.0
PATIENCE_S = 60.0


@dataclass
class Told:
    """What the uploader said."""

    events: list[tuple[str, Mapping[str, Json]]] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


@contextmanager
def uploading(
    url: str, told: Told, *, id: str = "folder-a", keep: int = 2, pause_s: float = 0.05
) -> Iterator[MirrorUploader]:
    def open_writer() -> MirrorWriter:
        mirror = Mirror(url, timeout_s=TIMEOUT_S)
        return MirrorWriter(mirror, mirror.claim(id, id))

    uploader = MirrorUploader(
        open_writer,
        keep=keep,
        tell=lambda kind, fields: told.events.append((kind, fields)),
        changed=lambda: told.progress.append(uploader.progress),
        first_pause_s=pause_s,
    )
    uploader.start()
    try:
        yield uploader
    finally:
        uploader.close(timeout_s=PATIENCE_S)


def offer(step: int, *sources: Source, scratch: tuple[Path, ...] = (), stage: str = "rl") -> Offer:
    data = f"state of {step}".encode()
    shard = Source(name="shard", data=data, size=len(data))
    return Offer(
        stage=stage, step=step, made=step, unix_s=time.time(), sources=(shard, *sources), scratch=scratch
    )


def soon(holds: Callable[[], object]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(holds())


def steps(url: str) -> list[int]:
    return [commit.step for commit in Mirror(url, timeout_s=10).commits()]


class Gate(Source):
    """A source whose reading waits until it is let through."""

    reached, opened = threading.Event(), threading.Event()

    def blocks(self) -> Iterator[bytes]:
        Gate.reached.set()
        assert Gate.opened.wait(PATIENCE_S)
        yield self.data


@pytest.fixture
def gate() -> Gate:
    Gate.reached.clear()
    Gate.opened.clear()
    return Gate(name="gate", data=b"x", size=1)


def test_a_commit_arrives_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    url, told = str(tmp_path / "mirror"), Told()
    with uploading(url, told) as uploader:
        for step in (2, 4, 6):
            uploader.offer(offer(step))
            assert soon(lambda: uploader.arrived)
        assert (uploader.progress.stage, uploader.progress.step, uploader.progress.commits) == ("rl", 6, 3)
        assert uploader.progress.lag_s(time.time()) == 0
    assert steps(url) == [4, 6]
    assert told.events == []


def test_of_the_commits_made_during_an_upload_only_the_newest_waits(tmp_path: Path, gate: Gate) -> None:
    url, told, scratch = str(tmp_path / "mirror"), Told(), [tmp_path / f"ledger-{n}" for n in range(4)]
    for path in scratch:
        path.touch()
    with uploading(url, told) as uploader:
        uploader.offer(offer(1, gate, scratch=(scratch[0],)))
        assert gate.reached.wait(PATIENCE_S)
        for step in (2, 3, 4):
            uploader.offer(offer(step, scratch=(scratch[step - 1],)))
        assert uploader.held("rl") == {1, 4}
        assert uploader.held("sft") == frozenset()
        assert (uploader.progress.lag_steps, uploader.progress.skipped) == (4, 2)
        assert 0 < uploader.progress.lag_s(time.time()) < PATIENCE_S
        assert not uploader.over
        gate.opened.set()
        assert soon(lambda: uploader.arrived)
        assert uploader.held("rl") == frozenset()
        assert (uploader.progress.step, uploader.progress.lag_steps) == (4, 0)
    assert steps(url) == [1, 4]
    assert told.kinds() == ["mirror_skipped"] * 2
    assert not any(path.exists() for path in scratch)


def test_a_commit_whose_files_are_gone_is_given_up_and_the_next_one_is_not(tmp_path: Path) -> None:
    url, told = str(tmp_path / "mirror"), Told()
    with uploading(url, told) as uploader:
        uploader.offer(offer(2, Source(name="x", path=tmp_path / "no", size=1)))
        assert soon(lambda: uploader.over)
        assert not uploader.arrived
        uploader.offer(offer(4))
        assert soon(lambda: uploader.arrived)
    assert steps(url) == [4]
    assert "cannot be read" in str(told.events[0][1]["message"])


def test_an_owner_that_was_replaced_is_told_and_copies_nothing_more(tmp_path: Path) -> None:
    url, told = str(tmp_path / "mirror"), Told()
    with uploading(url, told) as uploader:
        uploader.offer(offer(2))
        assert soon(lambda: uploader.arrived)
        uploader.check()
        Mirror(url, timeout_s=5).claim("folder-b", "process of folder-b", take_over=True)
        uploader.offer(offer(4))
        assert soon(lambda: uploader.over)
        with pytest.raises(FencedError, match=r"taken over .process of folder-b"):
            uploader.check()
        assert not uploader.arrived
    assert steps(url) == [2]


def test_the_mirror_of_another_run_is_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "mirror")
    Mirror(url, timeout_s=5).claim("folder-b", "b")
    with uploading(url, Told()) as uploader:
        uploader.offer(offer(2))
        assert soon(lambda: uploader.over)
        with pytest.raises(ConfigError, match="another run"):
            uploader.check()
    assert steps(url) == []


def test_closing_does_not_wait_for_a_mirror_that_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with uploading(str(tmp_path / "file" / "mirror"), told := Told(), pause_s=30) as uploader:
        uploader.offer(offer(2))
        assert soon(lambda: uploader.progress.error)
        start = time.monotonic()
    assert time.monotonic() - start < 5
    assert told.kinds() == ["mirror_failing"]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Faults]]:
    """A prefix that no other test uses: all servers of a process share their buckets."""
    with s3_server(monkeypatch) as (bucket, faults):
        yield f"{bucket}/{secrets.token_hex(4)}", faults


PASSING = ["500", "503", "reset", "lost", "stall"]


@pytest.mark.s3
@pytest.mark.parametrize(("fault", "times"), [*((fault, 1) for fault in PASSING), ("503", S3_ATTEMPTS - 1)])
def test_faults_fewer_than_the_attempts_of_a_request_are_invisible(
    s3: tuple[str, Faults], fault: str, times: int
) -> None:
    (url, faults), told = s3, Told()
    with uploading(url, told) as uploader:
        uploader.offer(offer(2))
        assert soon(lambda: uploader.arrived)
        faults.due = [fault] * times
        uploader.offer(offer(4))
        assert soon(lambda: uploader.arrived)
        assert (faults.due, uploader.progress.failures) == ([], 0)
    assert steps(url) == [2, 4]
    assert told.events == []


@pytest.mark.s3
@pytest.mark.parametrize("outage", [False, True], ids=["its answer", "its answer, and then nothing answers"])
def test_a_commit_whose_answer_got_lost_is_the_own_one(s3: tuple[str, Faults], outage: bool) -> None:
    (url, faults), told = s3, Told()
    with uploading(url, told) as uploader:
        uploader.offer(offer(2))
        assert soon(lambda: uploader.arrived)
        faults.concern = lambda method, path: "/log/" in path and (method == "PUT" or not faults.due)
        faults.due, faults.always = ["lost"], "reset" if outage else ""
        uploader.offer(offer(4))
        assert soon(lambda: uploader.progress.error if outage else uploader.arrived)
        faults.always = ""
        uploader.offer(offer(6))
        assert soon(lambda: uploader.arrived)
        uploader.check()
    assert steps(url)[-2:] == [4, 6]
    assert all(Mirror(url, timeout_s=10).manifest(commit) for commit in Mirror(url, timeout_s=10).commits())


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["503", "403", "stall"])
def test_an_outage_is_told_once_and_what_was_committed_last_arrives_when_it_is_over(
    s3: tuple[str, Faults], fault: str, tmp_path: Path
) -> None:
    (url, faults), told = s3, Told()
    faults.stall_s = 1.5
    with uploading(url, told) as uploader:
        uploader.offer(offer(2))
        assert soon(lambda: uploader.arrived)
        faults.always = fault
        for step in (4, 6, 8):
            start = time.monotonic()
            uploader.offer(offer(step))
            assert time.monotonic() - start < 0.5  # whoever commits does not notice
        assert soon(lambda: uploader.progress.error)
        assert url in uploader.progress.error
        assert uploader.progress.lag_steps == 6
        faults.always = ""
        assert soon(lambda: uploader.arrived and not uploader.progress.error)
        assert uploader.progress.lag_steps == 0
        assert uploader.progress.failures >= 1
    assert steps(url)[-1] == 8
    assert told.kinds().count("mirror_failing") == 1
    assert told.kinds().count("mirror_recovered") == 1
    assert fetch_newest(Mirror(url, timeout_s=10), tmp_path / "new").commit.step == 8


@pytest.mark.s3
def test_an_endpoint_that_is_down_at_the_start_is_claimed_when_it_is_up(
    s3: tuple[str, Faults],
) -> None:
    (url, faults), told = s3, Told()
    faults.always = "503"
    with uploading(url, told) as uploader:
        uploader.offer(offer(2))
        assert soon(lambda: uploader.progress.error)
        faults.always = ""
        assert soon(lambda: uploader.arrived)
    assert steps(url) == [2]


@pytest.mark.s3
def test_removals_that_are_refused_are_told_once_and_commits_go_on(s3: tuple[str, Faults]) -> None:
    (url, faults), told = s3, Told()
    faults.whole_bucket = True
    faults.concern = lambda method, path: method in ("DELETE", "POST")
    faults.always = "403"
    with uploading(url, told, keep=1) as uploader:
        for step in (2, 4, 6):
            uploader.offer(offer(step))
            assert soon(lambda: uploader.arrived)
        assert soon(lambda: uploader.progress.error)
        assert "cannot remove" in uploader.progress.error
        assert steps(url) == [2, 4, 6]
        faults.always = ""
        uploader.offer(offer(8))
        assert soon(lambda: told.kinds() == ["mirror_failing", "mirror_recovered"])
    assert steps(url) == [8]


def committed(url: str) -> Mirror:
    told = Told()
    with uploading(url, told) as uploader:
        for step in (2, 4):
            uploader.offer(offer(step))
            assert soon(lambda: uploader.arrived)
    return Mirror(url, timeout_s=TIMEOUT_S)


@pytest.mark.s3
@pytest.mark.parametrize("fault", [*PASSING, "cut"])
def test_a_fetch_passes_over_hiccups_and_not_over_commits(
    s3: tuple[str, Faults], fault: str, tmp_path: Path
) -> None:
    url, faults = s3
    mirror = committed(url)
    faults.concern = lambda method, path: method == "GET" and path.endswith("shard")
    faults.due = [fault]
    found = fetch_newest(mirror, tmp_path / "new")
    assert (found.commit.step, found.passed_over, faults.due) == (4, (), [])
    assert (tmp_path / "new" / "shard").read_bytes() == b"state of 4"


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["503", "403", "cut"])
def test_an_outage_during_a_fetch_is_an_error_and_no_reason_for_an_older_commit(
    s3: tuple[str, Faults], fault: str, tmp_path: Path
) -> None:
    url, faults = s3
    mirror = committed(url)
    faults.concern = lambda method, path: path.endswith("shard")
    faults.always = fault
    with pytest.raises(StorageError, match=f"cannot read {url}/data/.*shard"):
        fetch_newest(mirror, tmp_path / "new")


@pytest.mark.s3
def test_a_shard_that_is_listed_and_not_found_costs_its_commit(
    s3: tuple[str, Faults], tmp_path: Path
) -> None:
    url, faults = s3
    mirror = committed(url)
    path = mirror.manifest(mirror.commits()[-1])["shard"].path
    faults.concern = lambda method, asked: asked.endswith(path)
    faults.always = "404"
    found = fetch_newest(mirror, tmp_path / "new")
    assert found.commit.step == 2
    assert "is listed, and cannot be found" in found.passed_over[0]
    faults.always = ""
    assert open_store(url).exists(path)


@pytest.mark.s3
def test_an_entry_that_is_listed_and_not_found_is_an_error(s3: tuple[str, Faults], tmp_path: Path) -> None:
    url, faults = s3
    mirror = committed(url)
    faults.concern = lambda method, path: "/log/0" in path
    faults.always = "404"
    with pytest.raises(StorageError, match="is listed, and cannot be found"):
        fetch_newest(mirror, tmp_path / "new")
