"""Real engines that take weights as deltas: what they compute with is bit for bit what a dense version gives them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.actors.rollout.tiny_models import issue, write_model
from transformers import AutoModelForCausalLM

from treadle.actors.broadcast.deltas import StaleBaseError
from treadle.actors.broadcast.kept import Kept, Way
from treadle.actors.broadcast.outgoing import DENSE
from treadle.actors.broadcast.transports import check
from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.worker import RolloutWorker
from treadle.platform import failpoints
from treadle.platform.errors import BroadcastError
from treadle.platform.failpoints import failpoint
from treadle.platform.records import WeightManifest, WeightVersion

V0 = WeightVersion(step=0)
PROBE = [np.arange(2, 40, dtype=np.int32), np.arange(6, 20, dtype=np.int32)]
ENGINES = ["torch", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), tied=False, width=128, spread=0.1)


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm({})


class Learner:
    """Weights of which one in sixty changes per step, offered as the learner's first rank does."""

    def __init__(self, folder: str) -> None:
        self.state: dict[str, torch.Tensor] = dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())
        self._kept = Kept()
        self._held: set[str] = set(DENSE)

    def step(self, step: int) -> tuple[Way, Way]:
        """The new version as a delta from the one before (dense at first), and dense."""
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for tensor in self.state.values():
                tensor += (torch.rand(tensor.shape, generator=generator) < 1 / 60) * 0.03
        renewed = self._kept.renew(
            self.state.items(), step, self._held, bucket_bytes=1 << 16, dense_above=0.5
        )
        self._held = {renewed.dense.version.digest}
        return renewed.ways[0], self._kept.dense(step)


def fetched(manifest: WeightManifest, ticket: object, _: float) -> list[NDArray[np.uint8]]:
    """What was offered, through the damages that a line can do."""
    assert isinstance(ticket, list)
    buckets = [bucket.copy() for bucket in ticket]
    if failpoint("broadcast.in_transit"):
        buckets[0][len(buckets[0]) // 2] ^= 1
    for bucket in buckets:
        bucket.setflags(write=False)
    check(manifest, buckets)
    return buckets


async def carried(worker: RolloutWorker, way: Way) -> None:
    manifest, buckets = way
    assert (await worker.stage(manifest, buckets)).digest == manifest.version.digest
    assert await worker.flip(manifest.version) == manifest.version.digest


def worker_of(engine: str) -> RolloutWorker:
    return RolloutWorker(
        "w", RolloutConfig(engine=engine, slots=16, row_block=16, max_context_tokens=96), fetch=fetched
    )


def answers(engine: str, folder: str, *, dense: bool) -> Mapping[int, tuple[NDArray[np.float32], list[str]]]:
    """Scores and completions after each of three versions."""

    async def use() -> dict[int, tuple[NDArray[np.float32], list[str]]]:
        worker, learner = worker_of(engine), Learner(folder)
        await worker.load(folder, V0)
        found = {}
        try:
            for step in (1, 2, 3):
                by_delta, whole = learner.step(step)
                assert (by_delta[0].base is None) == (step == 1)
                await carried(worker, whole if dense else by_delta)
                assert worker.status().version == WeightVersion(step=step)
                _, _, texts = await worker.draw(issue(f"at {step}", step=step), step)
                found[step] = (await worker.logprobs(PROBE), list(texts))
        finally:
            worker.close()
        return found

    return asyncio.run(use())


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_fed_with_deltas_computes_as_one_fed_with_whole_versions(engine: str, folder: str) -> None:
    mine, theirs = answers(engine, folder, dense=False), answers(engine, folder, dense=True)
    for step in (1, 2, 3):
        np.testing.assert_array_equal(mine[step][0].view(np.int32), theirs[step][0].view(np.int32))
        assert mine[step][1] == theirs[step][1]
    assert np.abs(mine[1][0] - mine[2][0]).max() > 1e-3, "the versions must differ for this to mean anything"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_version_being_built_never_shows_in_the_one_in_use(engine: str, folder: str) -> None:
    """The engine must not go on reading what it was handed: the next delta is written there."""

    async def use() -> None:
        worker, learner = worker_of(engine), Learner(folder)
        await worker.load(folder, V0)
        try:
            await carried(worker, learner.step(1)[0])
            before = await worker.logprobs(PROBE)
            manifest, buckets = learner.step(2)[0]
            await worker.stage(manifest, buckets)
            np.testing.assert_array_equal(await worker.logprobs(PROBE), before)
            await worker.flip(manifest.version)
            assert np.abs(await worker.logprobs(PROBE) - before).max() > 1e-3
        finally:
            worker.close()

    asyncio.run(use())


@pytest.mark.parametrize("engine", ENGINES)
def test_every_damage_is_refused_and_the_version_in_use_stays(engine: str, folder: str) -> None:
    async def use() -> None:
        worker, learner = worker_of(engine), Learner(folder)
        await worker.load(folder, V0)
        try:
            await carried(worker, learner.step(1)[0])
            step = 1
            for fault, error, standby_survives in (
                ("broadcast.in_transit", BroadcastError, True),
                ("broadcast.stale_base", StaleBaseError, False),
                ("broadcast.lost_write", StaleBaseError, False),
            ):
                before = await worker.logprobs(PROBE)
                step += 1
                by_delta, whole = learner.step(step)
                failpoints.arm({failpoints.ENV: f"{fault}=corrupt@1"})
                with pytest.raises(error):
                    await worker.stage(*by_delta)
                with pytest.raises(BroadcastError, match=f"version {step} is not staged"):
                    await worker.flip(by_delta[0].version)
                np.testing.assert_array_equal(await worker.logprobs(PROBE), before)
                if standby_survives:
                    await carried(worker, by_delta)
                else:
                    with pytest.raises(StaleBaseError, match="holds nothing"):
                        await worker.stage(*by_delta)
                    await carried(worker, whole)
        finally:
            worker.close()

    asyncio.run(use())


def test_a_stage_that_another_model_overtook_is_not_adopted(folder: str) -> None:
    async def use() -> None:
        worker, learner = worker_of("torch"), Learner(folder)
        await worker.load(folder, V0)
        try:
            await carried(worker, learner.step(1)[0])
            by_delta, _ = learner.step(2)
            await worker.load(folder, V0)
            with pytest.raises(StaleBaseError, match="the engine holds nothing"):
                await worker.stage(*by_delta)
        finally:
            worker.close()

    asyncio.run(use())


def test_without_deltas_nothing_is_kept_beside_the_weights(folder: str) -> None:
    from treadle.actors.broadcast.buckets import pack

    async def use() -> None:
        worker = worker_of("torch")
        await worker.load(folder, V0)
        try:
            await carried(worker, pack(Learner(folder).state.items(), 1, 1 << 16))
            assert worker._standby.version is None
        finally:
            worker.close()

    asyncio.run(use())
