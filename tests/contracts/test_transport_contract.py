"""What every transport must do, run on every one of them between real processes."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray

from treadle.actors.broadcast import gloo
from treadle.actors.broadcast.buckets import pack
from treadle.actors.broadcast.chain import ChainTicket
from treadle.actors.broadcast.gloo import GlooTicket, GlooTransport
from treadle.actors.broadcast.object_store import ObjectStoreTicket, ObjectStoreTransport
from treadle.actors.broadcast.transports import TRANSPORTS, build, fetch
from treadle.actors.broadcast.url import UrlTicket
from treadle.platform.contracts import Transport
from treadle.platform.errors import BroadcastError, ConfigError, DeadlineError
from treadle.platform.records import WeightManifest

pytestmark = pytest.mark.ray

Buckets = list[NDArray[np.uint8]]


@ray.remote(num_cpus=0)
class Sender:
    def __init__(self, name: str, settings: Mapping[str, object]) -> None:
        self.transport = build(name, **settings)

    def pid(self) -> int:
        return os.getpid()

    def send(self, manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]]) -> object:
        return self.transport.send(manifest, buckets)


@ray.remote(num_cpus=0)
class Fetcher:
    def fetch(self, manifest: WeightManifest, ticket: object, deadline_s: float) -> Buckets:
        return [bucket.copy() for bucket in fetch(manifest, ticket, deadline_s)]

    def pid(self) -> int:
        return os.getpid()


@ray.remote(num_cpus=0)
def never() -> NDArray[np.uint8]:
    time.sleep(3600)
    return np.zeros(1, np.uint8)


@pytest.fixture(params=sorted(TRANSPORTS))
def name(request: pytest.FixtureRequest, ray_session: None) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """Of the transports that need any."""
    return {"url": {"url": f"file://{tmp_path_factory.mktemp('weights')}"}}


@pytest.fixture(scope="module")
def fetchers(ray_session: None) -> Iterator[list[ray.actor.ActorHandle]]:
    """Two engines' processes, for all tests that leave them alive: starting one is what costs."""
    handles = [Fetcher.remote() for _ in range(2)]
    yield handles
    for handle in handles:
        ray.kill(handle)


@pytest.fixture(scope="module")
def senders(
    ray_session: None, settings: dict[str, dict[str, object]]
) -> Iterator[dict[str, ray.actor.ActorHandle]]:
    """One learner process per transport, for all tests that leave it alive."""
    handles = {name: Sender.remote(name, settings.get(name, {})) for name in TRANSPORTS}
    yield handles
    for handle in handles.values():
        ray.kill(handle)


@pytest.fixture
def fetcher(fetchers: list[ray.actor.ActorHandle]) -> ray.actor.ActorHandle:
    return fetchers[0]


@pytest.fixture
def sender(senders: dict[str, ray.actor.ActorHandle], name: str) -> ray.actor.ActorHandle:
    return senders[name]


def _version(step: int = 1) -> tuple[WeightManifest, Buckets]:
    g = torch.Generator().manual_seed(step)
    return pack(((f"t{i}", torch.randn(5000, generator=g)) for i in range(30)), step, bucket_bytes=150_000)


def _same(received: Buckets, sent: Buckets) -> bool:
    return len(received) == len(sent) and all(map(np.array_equal, received, sent))


def _sent_by(sender: ray.actor.ActorHandle) -> tuple[WeightManifest, Buckets, object]:
    manifest, buckets = _version()
    return manifest, buckets, ray.get(sender.send.remote(manifest, buckets))


def test_it_keeps_the_protocol(name: str) -> None:
    assert isinstance(build(name), Transport)


def test_what_is_sent_arrives_bit_by_bit_in_another_process(
    sender: ray.actor.ActorHandle, fetcher: ray.actor.ActorHandle
) -> None:
    manifest, buckets, ticket = _sent_by(sender)
    assert len(buckets) > 3
    assert _same(ray.get(fetcher.fetch.remote(manifest, ticket, 20.0)), buckets)


def test_a_version_is_fetched_by_many_engines_at_once_and_again_later(
    sender: ray.actor.ActorHandle, fetchers: list[ray.actor.ActorHandle]
) -> None:
    manifest, buckets, ticket = _sent_by(sender)
    for _ in range(2):
        arrived = ray.get([engine.fetch.remote(manifest, ticket, 30.0) for engine in fetchers])
        assert all(_same(each, buckets) for each in arrived)


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing"])
def test_damaged_buckets_are_refused_and_named(
    sender: ray.actor.ActorHandle, fetcher: ray.actor.ActorHandle, damage: str
) -> None:
    manifest, buckets = _version()
    if damage == "missing":
        damaged, found = buckets[:-1], "buckets arrived"
    elif damage == "truncated":
        damaged, found = [buckets[0], buckets[1][:-3], *buckets[2:]], r"bucket 1 \(t7.*bytes instead of"
    else:
        bad = buckets[2].copy()
        bad[777] ^= 16
        damaged, found = [*buckets[:2], bad, *buckets[3:]], r"bucket 2 \(.*CRC-32"
    ticket = ray.get(sender.send.remote(manifest, damaged))
    with pytest.raises(BroadcastError, match=found):
        ray.get(fetcher.fetch.remote(manifest, ticket, 20.0))


def test_a_dead_sender_means_its_last_bytes_or_an_error_but_no_hang(
    name: str, fetcher: ray.actor.ActorHandle, settings: dict[str, dict[str, object]]
) -> None:
    """Shared memory may outlive its writer by a moment, and files do; a connection does not."""
    sender = Sender.remote(name, settings.get(name, {}))
    manifest, buckets, ticket = _sent_by(sender)
    os.kill(ray.get(sender.pid.remote()), signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(sender.pid.remote())
    fetched = fetcher.fetch.remote(manifest, ticket, 20.0)
    if name not in ("object_store", "url"):
        with pytest.raises(BroadcastError, match="version 1"):
            ray.get(fetched, timeout=15)
        return
    try:
        arrived = ray.get(fetched, timeout=15)
    except BroadcastError:
        return
    assert _same(arrived, buckets)


def test_what_comes_too_late_is_a_deadline_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, _ = _version()
    silent = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
    pending = never.remote()
    tickets = {
        "object_store": ObjectStoreTicket(step=1, buckets=(pending,)),
        "gloo": GlooTicket(
            step=1,
            serial=1,
            host="127.0.0.1",
            port=silent.getsockname()[1],
            sizes_bytes=manifest.bucket_bytes,
        ),
        "chain": ChainTicket(
            step=1,
            serial=b"1" * 16,
            source=("127.0.0.1", silent.getsockname()[1]),
            sizes_bytes=manifest.bucket_bytes,
            chunk_bytes=1 << 16,
            chunk_crc32=(),
            rotations=1,
            key=b"k",
        ),
        "url": UrlTicket(
            step=1,
            url="s3://bucket/weights",
            folder="0001-00000000/000001",
            manifest_bytes=1,
            manifest_crc32=1,
            timeout_s=1.0,
        ),
    }
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=r"version 1 did not arrive within 1.5 s"):
        fetch(manifest, tickets[name], 1.5)
    assert time.monotonic() - start < 5
    silent.close()
    ray.cancel(pending, force=True)


def test_a_killed_engine_holds_up_nobody(
    sender: ray.actor.ActorHandle, fetcher: ray.actor.ActorHandle
) -> None:
    manifest, buckets, ticket = _sent_by(sender)
    victim = Fetcher.remote()
    pid = ray.get(victim.pid.remote())
    hanging = victim.fetch.remote(manifest, ticket, 20.0)
    os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    assert _same(ray.get(fetcher.fetch.remote(manifest, ticket, 20.0)), buckets)
    assert time.monotonic() - start < 10
    ray.wait([hanging], timeout=10)


def test_a_foreign_ticket_is_refused(name: str) -> None:
    with pytest.raises(BroadcastError, match=r"no .* ticket"):
        build(name).receive("nonsense", 1.0)
    with pytest.raises(BroadcastError, match="names no known transport"):
        fetch(_version()[0], "nonsense", 1.0)


def test_an_unknown_transport_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="gloo, object_store"):
        build("carrier_pigeon")


def test_gloo_refuses_a_ticket_whose_version_was_replaced(ray_session: None) -> None:
    transport = GlooTransport(host="127.0.0.1")
    manifest, buckets = _version(1)
    old = transport.send(manifest, buckets)
    newer = transport.send(*_version(2))
    with pytest.raises(BroadcastError, match="newer version"):
        transport.receive(old, 5.0)
    assert _same(transport.receive(newer, 5.0), _version(2)[1])


def test_gloo_keeps_its_connections_for_the_next_fetch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport, opened = GlooTransport(host="127.0.0.1"), list[object]()
    connect = gloo._connected
    monkeypatch.setattr(gloo._Lines, "_all", {})
    monkeypatch.setattr(gloo, "_connected", lambda *where: opened.append(where) or connect(*where))
    for step in (1, 2, 3):
        assert _same(transport.receive(transport.send(*_version(step)), 5.0), _version(step)[1])
    assert len(opened) <= 2, "one at each end; six where each fetch opens its own"


def test_the_object_store_hands_out_shared_read_only_memory(ray_session: None) -> None:
    transport = ObjectStoreTransport()
    manifest, buckets = _version()
    ticket = transport.send(manifest, buckets)
    first, second = transport.receive(ticket, 5.0), transport.receive(ticket, 5.0)
    assert not first[0].flags.writeable
    assert first[0].ctypes.data == second[0].ctypes.data
