"""The mirror: who may commit to it, what a commit holds, and what is fetched from it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.platform.object_store import s3_server

from treadle.platform.errors import CheckpointError, ConfigError, DataError, FencedError
from treadle.platform.failpoints import ENV
from treadle.platform.mirror import Commit, Mirror, Owner, entry_path
from treadle.platform.mirror_reader import Fetched, fetch_newest
from treadle.platform.mirror_writer import MirrorWriter, Source
from treadle.platform.storage import Store, open_store

KINDS = ["file", pytest.param("s3", marks=pytest.mark.s3)]
SHARD = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as environ, s3_server(environ) as (url, _):
        yield url


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return str(tmp_path / "mirror")
    name = request.node.name.replace("[", "-").replace("]", "")
    return f"{request.getfixturevalue('bucket')}/{name}"


def opened(url: str) -> Mirror:
    return Mirror(url, timeout_s=5)


def writer(url: str, id: str = "folder-a", *, take_over: bool = False) -> MirrorWriter:
    mirror = opened(url)
    return MirrorWriter(mirror, mirror.claim(id, f"process of {id}", take_over=take_over))


def text(name: str, content: str) -> Source:
    return Source(name=name, data=content.encode(), size=len(content.encode()))


def shard(step: int) -> Source:
    data = bytes([step]) + SHARD
    return Source(name=f"checkpoints/rl/step-{step}/shard", data=data, size=len(data), crc32=zlib.crc32(data))


def run_at(step: int, *more: Source) -> tuple[Source, ...]:
    return (shard(step), text("ledger.sqlite", f"ledger of {step}"), *more)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fetched(url: str, folder: Path) -> Fetched:
    return fetch_newest(opened(url), folder)


def test_the_newest_commit_is_fetched_with_every_file(url: str, tmp_path: Path) -> None:
    owner = writer(url)
    owner.commit("rl", 2, run_at(2))
    owner.commit("rl", 4, run_at(4, text("empty", "")))
    found = fetched(url, tmp_path / "new")
    assert (found.commit.stage, found.commit.step, found.passed_over) == ("rl", 4, ())
    assert files(tmp_path / "new") == {
        "checkpoints/rl/step-4/shard": b"\x04" + SHARD,
        "ledger.sqlite": b"ledger of 4",
        "empty": b"",
    }


def test_an_empty_mirror_has_nothing_to_continue_from(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no commit"):
        fetched(url, tmp_path / "new")
    writer(url)
    with pytest.raises(DataError, match="holds no commit"):
        fetched(url, tmp_path / "new")


def test_a_file_of_the_disk_is_mirrored_up_to_the_length_it_had(url: str, tmp_path: Path) -> None:
    spool = tmp_path / "metrics.jsonl"
    spool.write_bytes(b"one\ntwo\nthree\n")
    writer(url).commit("rl", 1, [Source(name="metrics.jsonl", path=spool, size=8)])
    fetched(url, tmp_path / "new")
    assert files(tmp_path / "new") == {"metrics.jsonl": b"one\ntwo\n"}


def test_a_file_that_lasts_is_uploaded_once_and_again_only_when_it_changed(url: str, tmp_path: Path) -> None:
    model, owner = tmp_path / "model", writer(url)

    def commit(by: MirrorWriter, step: int) -> str:
        lasting = Source(name="model", path=model, size=model.stat().st_size, lasting=True)
        return opened(url).manifest(by.commit("rl", step, run_at(step, lasting)))["model"].path

    model.write_bytes(b"weights")
    first = commit(owner, 1)
    assert commit(owner, 2) == first
    assert commit(writer(url), 3) == first  # a process that has uploaded nothing yet
    model.write_bytes(b"WEIGHTS")
    last = writer(url)
    changed = commit(last, 4)
    assert changed != first
    last.retain(1)
    fetched(url, tmp_path / "new")
    assert files(tmp_path / "new")["model"] == b"WEIGHTS"
    assert not open_store(url).exists(first)


def test_a_lasting_file_that_vanished_from_the_mirror_is_uploaded_again(url: str, tmp_path: Path) -> None:
    store, owner = open_store(url), writer(url)
    lasting = Source(name="model", data=b"weights", size=7, lasting=True)
    owner.commit("rl", 1, run_at(1, lasting))
    first = opened(url).manifest(opened(url).commits()[-1])["model"].path
    store.remove(first)
    owner.retain(2)
    owner.commit("rl", 2, run_at(2, lasting))
    assert opened(url).manifest(opened(url).commits()[-1])["model"].path != first
    assert fetched(url, tmp_path / "new").passed_over == ()
    assert files(tmp_path / "new")["model"] == b"weights"


@pytest.mark.parametrize("whole", [True, False], ids=["missing", "damaged"])
def test_an_expendable_file_costs_no_commit_and_is_told(tmp_path: Path, whole: bool) -> None:
    url = str(tmp_path / "mirror")
    sample = Source(name="rollouts/1.parquet", data=b"samples", size=7, expendable=True)
    commit = writer(url).commit("rl", 2, run_at(2, sample))
    path = opened(url).manifest(commit)[sample.name].path
    if whole:
        open_store(url).remove(path)
    else:
        open_store(url).write_bytes(path, b"sampled")
    found = fetched(url, tmp_path / "new")
    assert found.commit == commit
    assert sorted(files(tmp_path / "new")) == [shard(2).name, "ledger.sqlite"]
    (line,) = found.passed_over
    assert line.startswith("rollouts/1.parquet is left out: ")


def test_a_mirror_of_another_format_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    url = str(tmp_path / "mirror")
    newest = writer(url).commit("rl", 2, run_at(2))
    path = tmp_path / "mirror" / entry_path(newest.number + 1)
    body = json.loads((tmp_path / "mirror" / entry_path(newest.number)).read_bytes()) | {"format": 7}
    body.pop("crc")
    path.write_text(json.dumps({**body, "crc": zlib.crc32(json.dumps(body, sort_keys=True).encode())}))
    before = files(tmp_path / "mirror")
    for act in (lambda: fetched(url, tmp_path / "new"), lambda: writer(url), opened(url).check_free):
        with pytest.raises(
            DataError, match=r"00000003: mirror format 7, this version reads 1\. Use the version"
        ):
            act()
    assert files(tmp_path / "mirror") == before


def test_a_shard_that_rotted_on_the_disk_is_not_mirrored_as_valid(url: str, tmp_path: Path) -> None:
    path, owner = tmp_path / "shard", writer(url)
    path.write_bytes(b"abcd")
    rotten = Source(name="shard", path=path, size=4, crc32=zlib.crc32(b"abce"))
    with pytest.raises(CheckpointError, match="shard is damaged: its CRC-32"):
        owner.commit("rl", 1, [rotten])
    for gone in (Source(name="x", path=path, size=5), Source(name="x", path=tmp_path / "no", size=1)):
        with pytest.raises(CheckpointError, match=r"shorter than|cannot be read"):
            owner.commit("rl", 1, [gone])
    assert opened(url).commits() == []


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Store, str], None]:
    return lambda store, path: store.write_bytes(path, change(store.read_bytes(path)))


def flipped(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 8]) + data[101:]


DAMAGES: list[tuple[str, Callable[[Store, str], None], str]] = [
    ("shard", damaged(lambda data: data[:-1]), "has 10240 bytes, not 10241"),
    ("shard", damaged(flipped), "shard is damaged: its CRC-32"),
    ("shard", lambda store, path: store.remove(path), "shard is missing"),
    ("manifest", lambda store, path: store.remove(path), "manifest.json is missing"),
    ("manifest", damaged(flipped), "manifest.json is damaged"),
    ("entry", damaged(flipped), "entry 3 .* it is damaged"),
]


@pytest.mark.parametrize(("what", "damage", "reason"), DAMAGES, ids=[f"{d[0]}: {d[2]}" for d in DAMAGES])
def test_a_damaged_commit_is_passed_over_for_the_one_before_and_told(
    tmp_path: Path, what: str, damage: Callable[[Store, str], None], reason: str
) -> None:
    url = str(tmp_path / "mirror")
    owner = writer(url)
    owner.commit("rl", 2, run_at(2))
    newest = owner.commit("rl", 4, run_at(4))
    paths = {
        "shard": opened(url).manifest(newest)[shard(4).name].path,
        "manifest": newest.manifest,
        "entry": entry_path(newest.number),
    }
    damage(open_store(url), paths[what])
    found = fetched(url, tmp_path / "new")
    assert found.commit.step == 2
    assert files(tmp_path / "new") == {shard(2).name: b"\x02" + SHARD, "ledger.sqlite": b"ledger of 2"}
    (line,) = found.passed_over
    assert "is passed over" in line
    assert re.search(reason, line), line


def test_a_manifest_that_names_files_outside_the_run_is_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "mirror")
    writer(url).commit("rl", 1, [text("../outside", "x")])
    with pytest.raises(DataError, match=r"names '\.\./outside', which lies outside"):
        fetched(url, tmp_path / "in" / "new")
    assert not (tmp_path / "in" / "outside").exists()


def test_an_owner_that_was_replaced_can_commit_nothing_more(url: str, tmp_path: Path) -> None:
    zombie = writer(url)
    zombie.commit("rl", 2, run_at(2))
    successor = writer(url, "folder-b", take_over=True)
    with pytest.raises(FencedError, match=r"taken over .process of folder-b"):
        zombie.commit("rl", 4, run_at(4, text("by", "zombie")))
    successor.commit("rl", 4, run_at(4, text("by", "successor")))
    with pytest.raises(FencedError, match="may commit nothing more there"):
        zombie.commit("rl", 6, run_at(6))
    fetched(url, tmp_path / "new")
    assert files(tmp_path / "new")["by"] == b"successor"


def test_an_owner_that_is_replaced_while_it_uploads_is_refused_at_the_last_moment(
    url: str, tmp_path: Path
) -> None:
    zombie, successors = writer(url), []
    zombie.commit("rl", 2, run_at(2))

    class Slow(Source):
        def blocks(self) -> Iterator[bytes]:
            successors.append(writer(url, "folder-b", take_over=True))
            yield self.data

    with pytest.raises(FencedError):
        zombie.commit("rl", 4, [Slow(name="x", data=b"zombie", size=6)])
    assert [commit.step for commit in opened(url).commits()] == [2]
    successors[0].commit("rl", 4, run_at(4))
    successors[0].retain(2)
    left = [path for path in open_store(url).files("data") if path.endswith("/x")]
    assert left == []


def test_a_folder_may_claim_its_own_mirror_again_and_nobody_elses(url: str) -> None:
    opened(url).check_free()
    first = writer(url)
    second = writer(url)
    with pytest.raises(FencedError):
        first.commit("rl", 1, run_at(1))
    second.commit("rl", 1, run_at(1))
    with pytest.raises(ConfigError, match=r"another run .process of folder-a.*treadle resume .* --dir NEW"):
        writer(url, "folder-b")
    with pytest.raises(ConfigError, match="another run"):
        opened(url).check_free()
    writer(url, "folder-b", take_over=True)
    with pytest.raises(FencedError, match=r"taken over .process of folder-b"):
        writer(url)


def together(count: int, action: Callable[[int], object]) -> list[object]:
    """What becomes of `count` calls at the same moment."""
    barrier, outcomes = threading.Barrier(count), []

    def one(index: int) -> None:
        barrier.wait()
        try:
            outcomes.append(action(index))
        except FencedError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return outcomes


def test_of_writers_that_take_a_mirror_over_one_may_commit(url: str) -> None:
    writer(url).commit("rl", 2, run_at(2))
    claimed = together(4, lambda n: writer(url, f"folder-{n}", take_over=True))
    owners = [outcome for outcome in claimed if isinstance(outcome, MirrorWriter)]
    assert owners
    committed = together(len(owners), lambda n: owners[n].commit("rl", 4, run_at(4)))
    assert len([outcome for outcome in committed if isinstance(outcome, Commit)]) == 1
    assert [commit.step for commit in opened(url).commits()] == [2, 4]


def test_a_commit_and_a_takeover_at_the_same_moment_have_an_order(url: str, tmp_path: Path) -> None:
    zombie = writer(url)
    zombie.commit("rl", 2, run_at(2))

    def act(n: int) -> object:
        return writer(url, "folder-b", take_over=True) if n else zombie.commit("rl", 4, run_at(4))

    outcomes = together(2, act)
    log = opened(url).entries()
    assert [entry.number for entry in log] == list(range(1, len(log) + 1))
    assert isinstance(log[-1], Owner)
    assert any(isinstance(o, Commit) for o in outcomes) == (len(log) == 4)
    with pytest.raises(FencedError):
        zombie.commit("rl", 6, run_at(6))


def test_only_the_newest_of_every_stage_are_kept_and_nothing_that_no_commit_needs(
    url: str, tmp_path: Path
) -> None:
    store, owner = open_store(url), writer(url)
    owner.commit("sft", 9, run_at(9))
    for step in (2, 4, 6):
        owner.commit("rl", step, run_at(step))
    store.write_bytes("data/00000001/00000099/orphan", b"of an upload that was interrupted")
    store.write_bytes("data/00000099/00000100/orphan", b"of an owner yet to come")
    assert [commit.step for commit in owner.retain(2)] == [2]
    assert [(c.stage, c.step) for c in opened(url).commits()] == [("sft", 9), ("rl", 4), ("rl", 6)]
    assert store.exists("data/00000099/00000100/orphan")
    store.remove("data/00000099")
    assert len(store.files("data")) == 3 * 3
    for _ in range(3):
        found = fetched(url, tmp_path / "new")
        store.remove(entry_path(found.commit.number))
    assert found.commit.step == 9


@pytest.mark.parametrize("point", ["mirror.before_manifest", "mirror.before_commit"])
def test_what_a_killed_upload_left_is_never_loaded_and_goes_with_the_next_commit(
    tmp_path: Path, point: str
) -> None:
    url = str(tmp_path / "mirror")
    writer(url).commit("rl", 2, run_at(2))
    code = (
        "import sys\nfrom tests.platform.test_mirror import *\nwriter(sys.argv[1]).commit('rl', 4, run_at(4))"
    )
    environ = {**os.environ, ENV: f"{point}=kill", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, url], env=environ, timeout=120)
    assert done.returncode == -9
    assert any(path.endswith("step-4/shard") for path in open_store(url).files("data"))
    assert fetched(url, tmp_path / "new").commit.step == 2
    successor = writer(url)
    successor.commit("rl", 6, run_at(6))
    successor.retain(2)
    assert not any(path.endswith("step-4/shard") for path in open_store(url).files("data"))
