"""Checkpoints: what is committed can be loaded, and what cannot be loaded is passed over with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from tests.platform.object_store import s3_server

from treadle.platform.checkpoints import CheckpointMeta, Checkpoints, verify
from treadle.platform.errors import CheckpointError, DataError
from treadle.platform.failpoints import ENV
from treadle.platform.storage import Store, open_store

KINDS = ["file", "memory", pytest.param("s3", marks=pytest.mark.s3)]
STAGE = "grpo"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as environ, s3_server(environ) as (url, _):
        yield url


@pytest.fixture(params=KINDS)
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return str(tmp_path / "checkpoints")
    name = request.node.name.replace("[", "-").replace("]", "")
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        return f"memory://{name}"
    return f"{request.getfixturevalue('bucket')}/{name}"


def _write(root: str, step: int) -> Store:
    folder = open_store(Checkpoints(root).begin(STAGE, step))
    folder.write_bytes("optimizer/shard-0", bytes([step]) * 5000)
    folder.write_bytes("shard-1", os.urandom(100))
    return folder


def _commit(root: str, step: int) -> Store:
    folder = _write(root, step)
    Checkpoints(root).commit(STAGE, _meta(step))
    return folder


def _meta(step: int) -> CheckpointMeta:
    return CheckpointMeta(
        step=step,
        cursor=step * 24,
        ledger_mark=step,
        config_fingerprint="f0",
        versions={"torch": "2.13"},
        extra={"x": [1]},
    )


def test_a_committed_checkpoint_is_found_with_its_meta(root: str) -> None:
    _commit(root, 50)
    newest = Checkpoints(root).newest_valid(STAGE)
    assert newest.ref is not None
    assert (newest.ref.url, newest.ref.stage, newest.ref.step) == (f"{root}/{STAGE}/step-00000050", STAGE, 50)
    assert newest.meta == _meta(50)
    assert newest.skipped == ()
    assert verify(newest.ref.url) == _meta(50)


def test_a_stage_without_checkpoints_has_none(root: str) -> None:
    newest = Checkpoints(root).newest_valid("nothing")
    assert (newest.ref, newest.meta, newest.skipped) == (None, None, ())


def _truncate(folder: Store) -> None:
    folder.write_bytes("optimizer/shard-0", folder.read_bytes("optimizer/shard-0")[:-1])


def _flip_a_bit(folder: Store) -> None:
    data = bytearray(folder.read_bytes("optimizer/shard-0"))
    data[2500] ^= 4
    folder.write_bytes("optimizer/shard-0", bytes(data))


def _damage_manifest(folder: Store) -> None:
    folder.write_bytes("manifest.json", folder.read_bytes("manifest.json").replace(b"1200", b"1201"))


DAMAGES: list[tuple[Callable[[Store], None], str]] = [
    (_truncate, "optimizer/shard-0 has 4999 bytes, not 5000"),
    (_flip_a_bit, "optimizer/shard-0 is damaged: its CRC-32"),
    (lambda folder: folder.remove("shard-1"), "shard-1 is missing"),
    (lambda folder: folder.remove("COMMITTED"), "not committed"),
    (lambda folder: folder.remove("manifest.json"), "manifest.json is missing"),
    (_damage_manifest, "manifest.json is damaged"),
    (lambda folder: folder.write_bytes("manifest.json", b"{"), "manifest.json is damaged"),
    (lambda folder: folder.write_bytes("manifest.json", b"[]"), "manifest.json is damaged"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=[reason for _, reason in DAMAGES])
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(
    root: str, damage: Callable[[Store], None], reason: str
) -> None:
    _commit(root, 49)
    damage(_commit(root, 50))
    newest = Checkpoints(root).newest_valid(STAGE)
    assert newest.ref is not None
    assert newest.ref.step == 49
    assert [(skipped.step, reason in skipped.reason) for skipped in newest.skipped] == [(50, True)]


def test_an_interrupted_write_is_never_loaded_and_can_be_repeated(root: str) -> None:
    _commit(root, 1)
    _write(root, 2)
    checkpoints = Checkpoints(root)
    newest = checkpoints.newest_valid(STAGE)
    assert newest.ref is not None
    assert newest.ref.step == 1
    assert "interrupted" in newest.skipped[0].reason
    _commit(root, 2)
    repeated = checkpoints.newest_valid(STAGE)
    assert repeated.ref is not None
    assert repeated.ref.step == 2


def test_a_committed_checkpoint_is_not_written_again(root: str) -> None:
    _commit(root, 1)
    with pytest.raises(CheckpointError, match="committed already"):
        Checkpoints(root).begin(STAGE, 1)


def test_an_empty_checkpoint_is_not_committed(root: str) -> None:
    with pytest.raises(CheckpointError, match="holds no files to commit"):
        Checkpoints(root).commit(STAGE, _meta(1))


def test_committing_twice_with_the_same_content_changes_nothing(root: str) -> None:
    _commit(root, 1)
    assert Checkpoints(root).commit(STAGE, _meta(1)).step == 1


def test_of_two_writers_one_commits_and_the_other_is_told(root: str) -> None:
    _write(root, 7)
    barrier, outcomes = threading.Barrier(2), []

    def commit(cursor: int) -> None:
        checkpoints = Checkpoints(root)
        barrier.wait()
        try:
            checkpoints.commit(STAGE, CheckpointMeta(step=7, cursor=cursor))
            outcomes.append(cursor)
        except CheckpointError as error:
            outcomes.append(str(error))

    if root.startswith("memory"):  # belongs to one thread: the writers take turns
        barrier = threading.Barrier(1)
        commit(1)
        commit(2)
    else:
        threads = [threading.Thread(target=commit, args=(cursor,)) for cursor in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    winners = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert len(winners) == 1
    assert any("sealed by another writer" in str(outcome) for outcome in outcomes)
    newest = Checkpoints(root).newest_valid(STAGE)
    assert newest.meta is not None
    assert newest.meta.cursor == winners[0]


def test_retaining_keeps_the_newest_and_leaves_unfinished_writes_alone(root: str) -> None:
    for step in (1, 2, 3):
        _commit(root, step)
    _write(root, 4)
    checkpoints = Checkpoints(root)
    assert [ref.step for ref in checkpoints.retain(STAGE, 2)] == [1]
    assert [ref.step for ref in checkpoints.committed(STAGE)] == [2, 3]
    assert checkpoints.remove_uncommitted(STAGE) == [checkpoints.url(STAGE, 4)]
    assert [ref.step for ref in checkpoints.remove_after(STAGE, 2)] == [3]
    assert open_store(root).list(STAGE) == ["step-00000002"]
    with pytest.raises(CheckpointError, match="would remove every checkpoint"):
        checkpoints.retain(STAGE, 0)


def test_half_a_removal_is_no_checkpoint(root: str) -> None:
    folder = _commit(root, 1)
    folder.remove("COMMITTED")
    assert Checkpoints(root).committed(STAGE) == []


def test_a_stage_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    for name in ("../x", "", "a/b", ".hidden"):
        with pytest.raises(CheckpointError, match="cannot name a folder"):
            Checkpoints(tmp_path).begin(name, 1)


def test_a_checkpoint_of_another_format_names_the_remedy(tmp_path: Path) -> None:
    import json
    import zlib

    folder = _commit(str(tmp_path), 1)
    body = json.loads(folder.read_bytes("manifest.json"))
    body.pop("crc32")
    body["format"] = 99
    crc = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    folder.write_bytes("manifest.json", json.dumps({**body, "crc32": crc}).encode())
    with pytest.raises(DataError, match="format 99, this version reads 1"):
        verify(folder.url)


@pytest.mark.parametrize("point", ["checkpoint.before_manifest", "checkpoint.before_marker"])
def test_a_process_killed_while_committing_leaves_nothing_that_loads(tmp_path: Path, point: str) -> None:
    root = str(tmp_path)
    _write(root, 1)
    code = (
        "import sys; from treadle.platform.checkpoints import *\n"
        f"Checkpoints(sys.argv[1]).commit('{STAGE}', CheckpointMeta(step=1, cursor=24))"
    )
    environ = {**os.environ, ENV: f"{point}=kill"}
    done = subprocess.run([sys.executable, "-c", code, root], env=environ, timeout=120)
    assert done.returncode == -9
    assert Checkpoints(root).newest_valid(STAGE).ref is None
    _commit(root, 1)
    assert Checkpoints(root).newest_valid(STAGE).ref is not None
