"""Deltas between learner and engines, without Ray: what travels, and what happens when it goes wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
from collections.abc import Iterator

import pytest
import torch
from tests.actors.broadcast.broadcast_fakes import (
    FakeEngine,
    FakeRank,
    InProcessEngine,
    InProcessRank,
    LoopbackGloo,
    sparse_weights,
    weights,
)

from treadle.actors.broadcast import transports
from treadle.actors.broadcast.config import BroadcastConfig
from treadle.actors.broadcast.coordinator import Coordinator
from treadle.actors.broadcast.deltas import Version, changes, class_of, densities, merged
from treadle.actors.broadcast.kept import MAPS, Kept
from treadle.actors.broadcast.outgoing import DENSE, Outgoing
from treadle.actors.broadcast.phases import Receiver
from treadle.kernels.digest import state_digest
from treadle.platform import failpoints
from treadle.platform import metric_names as names
from treadle.platform.errors import BroadcastError
from treadle.platform.records import PublishReport

CONFIG = BroadcastConfig(
    transport="gloo",
    bucket_bytes=1 << 14,
    delta="auto",
    anchor_every=0,
    gather_deadline_s=20,
    stage_deadline_s=20,
    flip_deadline_s=20,
)
TENSORS, SIZE = 4, 5000


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transports.TRANSPORTS, "gloo", f"{LoopbackGloo.__module__}:{LoopbackGloo.__name__}")


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    monkeypatch.delenv(failpoints.ENV, raising=False)
    failpoints.arm()


class Loom:
    """One rank whose weights change a little per version, some engines, one coordinator."""

    def __init__(
        self, config: BroadcastConfig = CONFIG, engines: int = 2, make: object = sparse_weights
    ) -> None:
        outgoing = Outgoing(
            transport=config.transport,
            bucket_bytes=config.bucket_bytes,
            delta=config.delta == "auto",
            dense_above=config.dense_above,
        )
        self.rank = FakeRank(0, TENSORS, SIZE, make)  # type: ignore[arg-type]
        self.engines = {f"rollout-{i}": InProcessEngine(FakeEngine(f"rollout-{i}")) for i in range(engines)}
        receivers: dict[str, Receiver] = dict(self.engines)
        self.coordinator = Coordinator(config, [InProcessRank(self.rank, outgoing)], receivers)
        self.token = self.coordinator.register()

    async def publish(self, step: int) -> PublishReport:
        report = await self.coordinator.publish(step, self.token)
        for name in report.adopted:
            self.assert_serves(name, step)
        return report

    def assert_serves(self, name: str, step: int) -> None:
        engine = self.engines[name].engine
        expected = self.rank.make(step, TENSORS, SIZE)
        assert engine.version.step == step
        assert engine.weights.keys() == expected.keys()
        assert all(torch.equal(engine.weights[key], expected[key]) for key in expected), name

    def bases(self, name: str) -> list[int | None]:
        """Of every version the engine was offered: the step of the base, None for dense."""
        return [None if m.base is None else m.base.step for m in self.engines[name].engine.fetches]


def published(loom: Loom, *steps: int) -> list[PublishReport]:
    async def scenario() -> list[PublishReport]:
        return [await loom.publish(step) for step in steps]

    return asyncio.run(scenario())


def test_after_the_first_version_only_changes_travel() -> None:
    loom = Loom()
    first, second, third = published(loom, 1, 2, 3)
    assert loom.bases("rollout-0") == loom.bases("rollout-1") == [None, 1, 2]
    dense = 2 * TENSORS * SIZE * 4
    assert first.sent_bytes >= dense
    for report in (second, third):
        assert report.sent_bytes < dense / 8
        assert report.metrics[names.WEIGHTS_DENSE_BYTES] >= dense
        assert report.metrics[names.WEIGHTS_BY_DELTA] == 2
        assert report.metrics[names.WEIGHTS_REFUSED] == 0
        assert report.metrics[names.WEIGHTS_DENSITY] == pytest.approx(1 / 40)
        assert report.metrics[names.WEIGHTS_DENSITY_OTHER] == pytest.approx(1 / 40)
        assert report.metrics[names.WEIGHTS_ENCODE_S] > 0
    assert names.WEIGHTS_DENSITY not in first.metrics
    assert first.metrics[names.WEIGHTS_BY_DELTA] == 0


def test_deltas_carry_the_very_digests_that_dense_versions_carry() -> None:
    by_delta, dense = Loom(), Loom(dataclasses.replace(CONFIG, delta="off"))
    mine, theirs = published(by_delta, 1, 2, 3), published(dense, 1, 2, 3)
    assert [r.version.digest for r in mine] == [r.version.digest for r in theirs]
    assert dense.bases("rollout-0") == [None, None, None]
    assert by_delta.bases("rollout-0") == [None, 1, 2]


def test_how_far_an_engine_is_behind_is_told_until_it_catches_up() -> None:
    async def scenario() -> None:
        loom = Loom(dataclasses.replace(CONFIG, stage_deadline_s=0.5))
        late = loom.engines["rollout-1"]
        await loom.publish(1)
        late.engine.slow_s = 1.0
        for step in (2, 3):
            report = await loom.publish(step)
            assert report.behind == ("rollout-1",)
            assert report.metrics[names.weights_lag("rollout-1")] == step - 1
            assert report.metrics[names.weights_lag("rollout-0")] == 0
        late.engine.slow_s = 0.0
        await asyncio.wait(loom.coordinator._fanout._late.values())
        report = await loom.publish(4)
        assert report.behind == ()
        assert report.metrics[names.weights_lag("rollout-1")] == 0
        # When it came to fetch version 2, the learner had version 3: it still holds version 1, and starts from there.
        assert loom.bases("rollout-1") == [None, 1, 1, 1]
        assert report.metrics[names.WEIGHTS_REFUSED] == 0

    asyncio.run(scenario())


def test_a_delta_over_several_versions_is_the_union_of_their_changes() -> None:
    async def scenario() -> None:
        loom = Loom()
        late = loom.engines["rollout-1"]
        await loom.publish(1)
        receivers = loom.coordinator._receivers
        held = receivers.pop("rollout-1")
        for step in (2, 3, 4):
            await loom.publish(step)
        receivers["rollout-1"] = held
        report = await loom.publish(5)
        assert loom.bases("rollout-1") == [None, 1]
        assert loom.bases("rollout-0") == [None, 1, 2, 3, 4]
        assert report.adopted == ("rollout-0", "rollout-1")
        one, four = late.engine.fetches[-1], loom.engines["rollout-0"].engine.fetches[-1]
        assert four.total_bytes < one.total_bytes < 4 * TENSORS * SIZE * 4 / 4

    asyncio.run(scenario())


def test_an_engine_that_missed_more_versions_than_are_remembered_gets_everything() -> None:
    async def scenario() -> None:
        loom = Loom()
        await loom.publish(1)
        held = loom.coordinator._receivers.pop("rollout-1")
        for step in range(2, MAPS + 3):
            await loom.publish(step)
        loom.coordinator._receivers["rollout-1"] = held
        await loom.publish(MAPS + 3)
        assert loom.bases("rollout-1") == [None, None]
        assert loom.bases("rollout-0")[-1] == MAPS + 2

    asyncio.run(scenario())


def test_every_anchor_and_every_new_publisher_starts_dense() -> None:
    async def scenario() -> None:
        loom = Loom(dataclasses.replace(CONFIG, anchor_every=3))
        for step in range(1, 8):
            await loom.publish(step)
        assert loom.bases("rollout-0") == [None, 1, 2, None, 4, 5, None]
        loom.token = loom.coordinator.register()
        await loom.publish(2)
        assert loom.bases("rollout-0")[-1] is None

    asyncio.run(scenario())


def test_a_respawned_engine_joins_dense_while_others_take_deltas() -> None:
    async def scenario() -> None:
        loom = Loom()
        for step in (1, 2):
            await loom.publish(step)
        joined = InProcessEngine(FakeEngine("rollout-9"))
        loom.engines["rollout-9"] = joined
        assert await loom.coordinator.catch_up("rollout-9", joined) is not None
        loom.assert_serves("rollout-9", 2)
        await loom.publish(3)
        assert loom.bases("rollout-9") == [None, 2]

    asyncio.run(scenario())


def test_too_much_change_travels_dense() -> None:
    loom = Loom(make=weights)
    reports = published(loom, 1, 2)
    assert loom.bases("rollout-0") == [None, None]
    assert reports[1].metrics[names.WEIGHTS_DENSITY] == 1.0
    sparse = Loom(dataclasses.replace(CONFIG, dense_above=0.01))
    published(sparse, 1, 2)
    assert sparse.bases("rollout-0") == [None, None]


def test_a_step_that_changed_nothing_sends_next_to_nothing() -> None:
    loom = Loom(make=lambda step, *shape: sparse_weights(min(step, 2), *shape))
    reports = published(loom, 1, 2, 3, 4)
    assert loom.bases("rollout-0") == [None, 1, 2, 3]
    assert reports[2].sent_bytes < 2 * 200
    assert reports[3].version.digest == reports[1].version.digest
    assert {v.step for v in loom.coordinator.held.values()} == {4}


def test_going_back_to_an_earlier_state_is_told_right() -> None:
    loom = Loom(make=lambda step, *shape: sparse_weights({1: 1, 2: 2, 3: 1, 4: 2}[step], *shape))
    published(loom, 1, 2, 3, 4)
    assert loom.bases("rollout-0") == [None, 1, 2, 3]


@pytest.mark.parametrize(
    ("fault", "offered", "refused"),
    [
        ("broadcast.in_transit=corrupt@2", [None, 1, 1], 1),
        ("broadcast.truncated=corrupt@2", [None, 1, 1], 1),
        ("broadcast.stale_base=corrupt@1", [None, 1, None], 1),
        ("broadcast.lost_write=corrupt@1", [None, 1, None], 1),
    ],
    ids=["a bit flipped in transit", "a truncated chunk", "a stale base", "a failed write"],
)
def test_what_goes_wrong_is_refused_and_fetched_again(
    faults: pytest.MonkeyPatch, fault: str, offered: list[int | None], refused: int
) -> None:
    """A damaged delta is repeated; where the base is gone, or is not what it should be, everything is fetched."""
    faults.setenv(failpoints.ENV, fault)
    failpoints.arm()
    loom = Loom(engines=1)
    reports = published(loom, 1, 2, 3)
    assert loom.bases("rollout-0") == [*offered, 2]
    assert [int(r.metrics[names.WEIGHTS_REFUSED]) for r in reports] == [0, refused, 0]
    assert all(report.behind == () for report in reports)
    assert reports[1].sent_bytes == sum(m.total_bytes for m in loom.engines["rollout-0"].engine.fetches[1:-1])


@pytest.mark.parametrize("point", ["in_transit", "truncated"])
def test_a_line_that_damages_everything_leaves_the_version_in_use(
    faults: pytest.MonkeyPatch, point: str
) -> None:
    loom = Loom()
    published(loom, 1)
    faults.setenv(failpoints.ENV, f"broadcast.{point}=corrupt@*")
    failpoints.arm()
    with pytest.raises(BroadcastError, match=r"no engine adopted version 2"):
        published(loom, 2)
    assert loom.bases("rollout-0") == [None, 1, 1, None, None]
    for name in loom.engines:
        loom.assert_serves(name, 1)
    faults.delenv(failpoints.ENV)
    failpoints.arm()
    assert published(loom, 3)[0].behind == ()


def test_a_loader_that_changes_weights_is_given_everything_before_it_is_given_up() -> None:
    loom = Loom()
    published(loom, 1)
    loom.engines["rollout-1"].engine.spoil = 1
    report = published(loom, 2)[0]
    assert report.behind == ()
    assert loom.bases("rollout-1") == [None, 1, None]
    assert report.sent_bytes > TENSORS * SIZE * 4


def test_memory_travels_empty_and_a_newer_version_cannot_be_had_by_an_older_name() -> None:
    outgoing = Outgoing(transport="gloo", bucket_bytes=1 << 14, delta=True)
    outgoing.offer(sparse_weights(1).items(), 1, DENSE)
    assert outgoing.dense(1)[0].version.step == 1
    with pytest.raises(BroadcastError, match="version 2 is asked for, the learner's newest is 1"):
        outgoing.dense(2)
    copy = pickle.loads(pickle.dumps(outgoing))
    assert copy == outgoing
    with pytest.raises(BroadcastError, match="the learner's newest is none"):
        copy.dense(1)


def test_another_model_starts_anew() -> None:
    kept = Kept()
    settings = {"bucket_bytes": 1 << 14, "dense_above": 1.0}
    first = kept.renew(sparse_weights(1).items(), 1, DENSE, **settings)  # type: ignore[arg-type]
    other = kept.renew(
        sparse_weights(2, tensors=3).items(),
        2,
        {first.dense.version.digest},
        **settings,  # type: ignore[arg-type]
    )
    assert [manifest.base for manifest, _ in other.ways] == [None]
    assert names.WEIGHTS_DENSITY not in other.metrics


def test_a_model_with_wide_integers_is_published_dense() -> None:
    kept = Kept()
    state = {"w": torch.ones(3), "steps": torch.arange(4)}
    first = kept.renew(state.items(), 1, DENSE, bucket_bytes=1000, dense_above=1.0)
    state["w"] = state["w"] + 1
    second = kept.renew(state.items(), 2, {first.dense.version.digest}, bucket_bytes=1000, dense_above=1.0)
    assert [manifest.base for manifest, _ in second.ways] == [None]
    assert second.dense.version.digest == state_digest(state.items())


def version(state: dict[str, torch.Tensor]) -> Version:
    from treadle.actors.broadcast.buckets import pack

    return Version.of(*pack(state.items(), 1, 1 << 20))


def test_maps_mark_bits_and_not_values_and_add_up() -> None:
    old = torch.tensor([0.0, 1.0, float("nan"), 4.0] * 10)
    new, newer = old.clone(), old.clone()
    new[0], new[37] = -0.0, 9.0
    newer[2] = -newer[2]
    maps = [changes(version({"w": old}), version({"w": other})) for other in (new, newer)]
    assert [m[0].tolist() for m in maps] == [[1, 1 << 5], [4, 0]]
    assert merged(maps)[0].tolist() == [5, 1 << 5]
    assert maps[0][0].tolist() == [1, 1 << 5], "the maps themselves stay"


def test_densities_are_told_by_class() -> None:
    sizes = {
        "model.embed_tokens.weight": 100,
        "model.layers.0.self_attn.q_proj.weight": 64,
        "model.layers.0.self_attn.k_norm.weight": 8,
        "model.layers.0.mlp.gate_proj.weight": 50,
        "model.layers.0.mlp.experts.3.up_proj.weight": 50,
        "model.layers.0.input_layernorm.weight": 8,
        "lm_head.weight": 10,
        "rotary.table": 5,
    }
    old = {name: torch.zeros(size) for name, size in sizes.items()}
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["model.embed_tokens.weight"][:25] = 1
    new["model.layers.0.mlp.experts.3.up_proj.weight"][:10] = 1
    new["lm_head.weight"][0] = 1
    a, b = version(old), version(new)
    assert densities(a.layout, changes(a, b)) == {
        names.WEIGHTS_DENSITY: pytest.approx(36 / 295),
        names.WEIGHTS_DENSITY_EMBEDDING: 0.25,
        names.WEIGHTS_DENSITY_ATTENTION: 0.0,
        names.WEIGHTS_DENSITY_NORM: 0.0,
        names.WEIGHTS_DENSITY_MLP: 0.1,
        names.WEIGHTS_DENSITY_HEAD: 0.1,
        names.WEIGHTS_DENSITY_OTHER: 0.0,
    }
    assert class_of("transformer.h.0.ln_1.weight") == names.WEIGHTS_DENSITY_NORM
    assert class_of("transformer.wte.weight") == names.WEIGHTS_DENSITY_EMBEDDING
