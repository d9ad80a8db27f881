"""Weights through a URL without a server: what stays on a disk, what may be set, when this way is chosen."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.actors.broadcast.test_url import transport, version

from treadle.actors.broadcast import url_objects
from treadle.actors.broadcast.config import BroadcastConfig
from treadle.actors.broadcast.transports import chosen, fetch, spread
from treadle.actors.broadcast.url import UrlTransport, _Sender
from treadle.platform.errors import BroadcastError, ConfigError, StorageError
from treadle.platform.storage import open_store


def test_it_is_the_same_on_a_disk_and_old_versions_are_removed(tmp_path: Path) -> None:
    mine = transport(f"file://{tmp_path}/weights")
    for step in range(1, 6):
        manifest, buckets = version(step)
        ticket = mine.send(manifest, buckets)
        assert all(map(np.array_equal, fetch(manifest, ticket, 10.0), buckets))
    assert soon(lambda: len(list(tmp_path.glob("weights/*/*"))) == 2)
    assert sorted(path.name for path in tmp_path.glob("weights/*/*")) == ["000004", "000005"]


def test_a_version_offered_from_many_bases_keeps_them_all(tmp_path: Path) -> None:
    mine = transport(f"file://{tmp_path}/weights")
    manifest, buckets = version(3)
    from_1 = replace(manifest, base=replace(manifest.version, step=1, digest="1" * 32))
    from_2 = replace(manifest, base=replace(manifest.version, step=2, digest="2" * 32))
    first = mine.send(manifest, buckets)
    tickets = [mine.send(way, buckets) for way in (manifest, from_1, from_2)]
    kept = {ticket.folder.rpartition("/")[2] for ticket in tickets}
    assert soon(lambda: {path.name for path in tmp_path.glob("weights/*/*")} == kept)
    with pytest.raises(BroadcastError, match="is missing"):
        fetch(manifest, first, 10.0)
    for way, ticket in zip((manifest, from_1, from_2), tickets, strict=True):
        assert all(map(np.array_equal, fetch(way, ticket, 10.0), buckets))


def test_a_sender_removes_what_its_predecessors_left_and_nothing_of_its_successors(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/weights"
    store = open_store(url)
    store.write_bytes("0003-aaaaaaaa/000001/00000000", b"left by a learner that died")
    store.write_bytes("notes/mine", b"somebody's")
    manifest, buckets = version(1)
    ticket = transport(url).send(manifest, buckets)
    assert ticket.folder.startswith("0004-")
    store.write_bytes("0005-bbbbbbbb/000001/00000000", b"of the one that replaced it")
    assert soon(lambda: not store.exists("0003-aaaaaaaa"))
    transport(url).send(*version(2))
    _swept(url)
    assert store.exists("0005-bbbbbbbb/000001/00000000")
    assert store.exists("notes/mine")


def _swept(url: str) -> None:
    time.sleep(0.05)
    with _Sender._senders[url]._sweeping:
        pass


def soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def test_versions_larger_than_a_piece_arrive_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.actors.broadcast.url.PIECE_BYTES", 999)
    manifest, buckets = version(1)
    ticket = transport(f"file://{tmp_path}").send(manifest, buckets)
    files = [path.name for path in (tmp_path / ticket.folder).iterdir()]
    assert len(files) - 1 == sum(-(-len(bucket) // 999) for bucket in buckets) > len(buckets)
    assert all(map(np.array_equal, fetch(manifest, ticket, 10.0), buckets))


def test_work_of_many_lanes_ends_with_its_first_error_or_at_the_deadline() -> None:
    def work(item: int) -> None:
        if item == 3:
            raise StorageError("three")
        time.sleep(0.01 if item < 90 else 5)

    began = time.monotonic()
    url_objects.each(work, [0, 1, 2, 4], began + 5, str)
    with pytest.raises(StorageError, match="three"):
        url_objects.each(work, range(40), began + 5, str)
    with pytest.raises(TimeoutError, match="no answer about item 90"):
        url_objects.each(work, [1, 90], time.monotonic() + 0.3, lambda item: f"item {item}")
    url_objects.each(work, [], began, str)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"transport": "url"}, "broadcast.transport=url needs broadcast.url"),
        ({"url": "s3://b/x"}, "broadcast.url=s3://b/x is not used with broadcast.transport=object_store"),
        ({"transport": "gloo", "url": "s3://b/x"}, "not used with broadcast.transport=gloo"),
        ({"transport": "url", "url": "gopher://b/x"}, "broadcast.url=gopher://b/x: no storage for gopher://"),
        ({"transport": "url", "url": "memory://x"}, "memory of one process"),
        ({"transport": "url", "url": "runs/weights"}, "relative path"),
        ({"transport": "auto", "url": "file://weights"}, "relative path"),
        ({"transport": "url", "url": "/x", "url_timeout_s": 0.0}, "broadcast.url_timeout_s=0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_sentence(
    settings: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        BroadcastConfig(**settings).check()  # type: ignore[arg-type]
    assert caught.value.remedy
    for url in ("s3://bucket/prefix", "file:///shared/weights", "/shared/weights"):
        for name in ("url", "auto"):
            BroadcastConfig(transport=name, url=url).check()


def test_the_url_is_chosen_where_nodes_are_far_from_each_other() -> None:
    assert chosen("auto", 2**30, 8, 8, far=True) == "url"
    assert chosen("auto", 2**10, 1, 2, far=True) == "url"
    assert chosen("auto", 2**30, 8, 8) == "chain"
    assert chosen("auto", 2**10, 1, 2) == "object_store"
    assert chosen("gloo", 2**10, 1, 2, far=True) == "gloo"


def test_nodes_of_several_regions_are_far_from_each_other() -> None:
    here, there = {"ray.io/availability-region": "eu-north-1"}, {"ray.io/availability-region": "us-west-2"}
    assert spread([here, there])
    assert not spread([here, here])
    assert not spread([here, {}, {"ray.io/node-group": "rollout"}])
    assert not spread([])


def test_a_transport_without_its_url_says_so() -> None:
    with pytest.raises(ConfigError, match=r"broadcast\.url is empty"):
        UrlTransport().send(*version())
