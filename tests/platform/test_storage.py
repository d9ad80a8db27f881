"""The store on a disk, in memory and on a real S3 protocol server: the same promises everywhere."""

from __future__ import annotations

import errno
import os
import pickle
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from tests.platform.object_store import s3_server, silent_endpoint
from tests.platform.small_disk import small_disk

from treadle.platform.errors import StorageError
from treadle.platform.local_disk import free_bytes_at
from treadle.platform.storage import S3_ATTEMPTS, Store, free_bytes, local_path, open_parent, open_store

KINDS = ["file", "memory", pytest.param("s3", marks=pytest.mark.s3)]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as environ, s3_server(environ) as (url, _):
        yield url


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return open_store(tmp_path / "root")
    name = request.node.name.partition("[")[0]
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        return open_store(f"memory://{name}")
    return open_store(f"{request.getfixturevalue('bucket')}/{name}")


def test_an_empty_store_holds_nothing_and_says_so(store: Store) -> None:
    assert (store.list(), store.files(), store.exists("x"), store.try_read("x")) == ([], {}, False, None)


def test_written_bytes_are_read_back_and_replaced_as_a_whole(store: Store) -> None:
    store.write_bytes("a/b.bin", b"hello")
    store.write_bytes("a/b.bin", b"other")
    assert store.read_bytes("a/b.bin") == b"other"
    assert store.size_bytes("a/b.bin") == 5
    assert store.crc32("a/b.bin") == zlib.crc32(b"other")
    assert (store.list(), store.list("a"), store.files()) == (["a"], ["b.bin"], {"a/b.bin": 5})


def test_only_the_first_of_two_exclusive_writers_wins(store: Store) -> None:
    assert store.create_exclusive("marker", b"first")
    assert not store.create_exclusive("marker", b"second")
    assert store.read_bytes("marker") == b"first"


@pytest.mark.parametrize("store", ["file", pytest.param("s3", marks=pytest.mark.s3)], indirect=True)
def test_of_eight_racing_writers_exactly_one_wins(store: Store) -> None:
    barrier, won = threading.Barrier(8), []

    def race(number: int) -> None:
        barrier.wait()
        if store.create_exclusive("marker", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [b"%d" % number for number in won] == [store.read_bytes("marker")]


def test_a_stream_appears_when_it_is_finished(store: Store) -> None:
    with store.writing("w/x") as stream:
        stream.write(b"abc")
        assert not store.exists("w/x")
        stream.write(b"d" * 100)
    assert store.read_bytes("w/x") == b"abc" + b"d" * 100


def _fail_half_way(store: Store, name: str) -> None:
    with store.writing(name) as stream:
        stream.write(b"half")
        raise KeyError(name)


def test_a_stream_that_fails_leaves_no_file_and_keeps_the_old_one(store: Store) -> None:
    store.write_bytes("old", b"old")
    for name in ("new", "old"):
        with pytest.raises(KeyError):
            _fail_half_way(store, name)
    assert store.files() == {"old": 3}
    assert store.read_bytes("old") == b"old"


def test_a_file_larger_than_a_block_survives_the_round_trip(store: Store, tmp_path: Path) -> None:
    data = os.urandom(9 * 2**20 + 7)
    store.write_bytes("large", data)
    assert store.crc32("large") == zlib.crc32(data)
    local = open_store(tmp_path / "copy")
    store.copy_to("large", local, "large")
    local.copy_to("large", store, "again")
    assert store.read_bytes("again") == data


def test_a_folder_is_never_nested_below_an_existing_one(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "one").write_bytes(b"1")
    (source / "deep" / "two").write_bytes(b"22")
    for _ in range(2):
        store.upload(source, "up")
        store.download(tmp_path / "down", "up")
    assert store.files("up") == {"deep/two": 2, "one": 1}
    assert open_store(tmp_path / "down").files() == {"deep/two": 2, "one": 1}


def test_removing_takes_a_whole_folder_and_may_be_repeated(store: Store) -> None:
    store.write_bytes("a/b/c", b"1")
    store.write_bytes("ab", b"2")
    for _ in range(2):
        store.remove("a")
    assert store.files() == {"ab": 1}


def test_a_missing_file_is_named_with_its_url(store: Store) -> None:
    with pytest.raises(StorageError, match=f"cannot read {store.url}/nope.*does not exist"):
        store.read_bytes("nope")
    with pytest.raises(StorageError, match="holds no files"):
        store.download(Path("/nowhere"), "nope")


def test_a_store_can_be_sent_to_another_process(store: Store) -> None:
    store.write_bytes("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read_bytes("x") == b"1"


def test_a_child_store_and_a_files_parent_see_the_same_files(store: Store) -> None:
    store.child("a/b").write_bytes("c", b"1")
    parent, name = open_parent(f"{store.url}/a/b/c")
    assert parent.read_bytes(name) == store.read_bytes("a/b/c") == b"1"


def test_a_remote_folder_is_cached_until_it_changes(store: Store, tmp_path: Path) -> None:
    store.write_bytes("model/config.json", b"{}")
    with local_path(f"{store.url}/model", tmp_path / "cache") as first:
        assert (first / "config.json").read_bytes() == b"{}"
    with local_path(f"{store.url}/model", tmp_path / "cache") as second:
        assert second == first
    store.write_bytes("model/config.json", b"{1}")
    with local_path(f"{store.url}/model", tmp_path / "cache") as third:
        assert (third / "config.json").read_bytes() == b"{1}"
    assert (first == tmp_path / "root" / "model") == store.is_local


def test_temporary_files_of_a_killed_writer_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".x.123.abc.tmp").write_bytes(b"half")
    assert open_store(tmp_path).files() == {}


def test_a_path_on_a_disk_is_only_given_for_a_disk(tmp_path: Path) -> None:
    assert open_store(f"file://{tmp_path}").path_of("x") == tmp_path / "x"
    assert free_bytes(tmp_path / "not" / "there") == free_bytes_at(tmp_path)
    assert free_bytes("memory://x") is None
    with pytest.raises(StorageError, match="is not on a local disk"):
        open_store("memory://x").path_of("x")


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(StorageError, match="no storage for gopher://"):
        open_store("gopher://x/y")


def test_a_folder_without_permission_or_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}/file/x"):
        open_store(tmp_path).write_bytes("file/x", b"1")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small", "256k") as folder:
        yield folder


def test_a_full_disk_is_one_error_and_leaves_nothing_half_written(full_disk: Path, tmp_path: Path) -> None:
    store = open_store(full_disk)
    store.write_bytes("kept", b"old")
    big = os.urandom(2**20)
    source = open_store(tmp_path / "source")
    source.write_bytes("big", big)
    attempts = [
        lambda: store.write_bytes("kept", big),
        lambda: store.create_exclusive("new", big),
        lambda: source.copy_to("big", store, "copy"),
    ]
    for attempt in attempts:
        with pytest.raises(
            StorageError, match=rf"disk full: cannot \w+ {full_disk}/\w+, \d+ bytes are free"
        ) as caught:
            attempt()
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ENOSPC
    assert os.listdir(full_disk) == ["kept"]
    assert store.read_bytes("kept") == b"old"
    store.write_bytes("fits", b"x" * 1000)


@pytest.mark.s3
def test_an_endpoint_that_accepts_and_stays_silent_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with silent_endpoint() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        start = time.monotonic()
        with pytest.raises(StorageError, match=f"s3://bucket/x: the S3 endpoint {endpoint} does not answer"):
            open_store("s3://bucket/x")
        assert time.monotonic() - start < 15


@pytest.mark.s3
def test_an_endpoint_nobody_listens_on_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        StorageError, match=r"s3://bucket/x: the S3 endpoint http://127.0.0.1:9 does not answer"
    ):
        open_store("s3://bucket/x")


@pytest.mark.s3
def test_a_server_that_dies_is_one_error_with_url_and_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(monkeypatch) as (url, _):
        store = open_store(f"{url}/x")
        store.write_bytes("a", b"1")
    start = time.monotonic()
    with pytest.raises(StorageError, match=f"cannot read {url}/x/a at endpoint http://127.0.0.1"):
        store.read_bytes("a")
    assert time.monotonic() - start < 15


@pytest.mark.s3
def test_a_bucket_that_does_not_exist_is_named(bucket: str) -> None:
    with pytest.raises(
        StorageError, match=r"cannot write s3://no-such-bucket/x/a at endpoint .*does not exist"
    ):
        open_store("s3://no-such-bucket/x").write_bytes("a", b"1")


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["500", "503"])
def test_two_hiccups_of_a_server_go_unnoticed(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    with s3_server(monkeypatch) as (url, faults):
        store = open_store(url)
        faults.due = [fault] * 2
        store.write_bytes("a", b"1")
        faults.due = [fault] * 2
        assert store.read_bytes("a") == b"1"
        assert faults.due == []


@pytest.mark.s3
def test_a_server_that_keeps_failing_is_asked_a_bounded_number_of_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with s3_server(monkeypatch) as (url, faults):
        store = open_store(url)
        before, faults.due = faults.seen, ["503"] * 100
        start = time.monotonic()
        with pytest.raises(StorageError, match=f"cannot write {url}/a at endpoint"):
            store.write_bytes("a", b"1")
        assert faults.seen - before == S3_ATTEMPTS
        assert time.monotonic() - start < 15
        faults.due = []


@pytest.mark.s3
def test_a_body_that_is_cut_short_once_is_read_again_and_never_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with s3_server(monkeypatch) as (url, faults):
        store = open_store(url)
        store.write_bytes("a", b"x" * 100_000)
        faults.due = ["cut"]
        assert len(store.read_bytes("a")) == 100_000
        faults.due = ["cut"] * 20
        with pytest.raises(StorageError, match=f"cannot read {url}/a"):
            store.read_bytes("a")
        faults.due = []
