"""The Ray group: references, publishing, stages without a restart, and failures that are told in bounded time."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Collection, Coroutine, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import ray
import torch
from tests.actors.learner.ranks import VOCAB, tiny_model

from treadle.actors.broadcast.buckets import pack
from treadle.actors.learner.config import GroupConfig, LearnerConfig
from treadle.actors.learner.group import LearnerGroup
from treadle.actors.learner.stepping import LearnerSpec
from treadle.platform.errors import DeadlineError, LearnerError
from treadle.platform.objectives.grpo import Grpo
from treadle.platform.records import (
    Credit,
    Group,
    Offered,
    Prompt,
    Sample,
    Share,
    StepBatch,
    StopReason,
    WeightManifest,
    WeightVersion,
)

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed]
T = TypeVar("T")
START = WeightVersion(step=0)
CONFIG = LearnerConfig(
    backend="deepspeed", zero=2, ranks=2, lr=1e-2, cpus=1.0, step_deadline_s=120.0, start_deadline_s=280.0
)


def wait(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def drawn_group(number: int) -> Group:
    rng = np.random.default_rng(number)
    prompt = Prompt(
        id=f"p{number}",
        text="1+1=",
        token_ids=rng.integers(0, VOCAB, 4, dtype=np.int32),
        verifier="exact",
        payload={},
    )
    samples = []
    for index in range(4):
        n = int(rng.integers(8, 20))
        mask = np.arange(n) >= 4
        samples.append(
            Sample(
                index=index,
                token_ids=np.concatenate([prompt.token_ids, rng.integers(0, VOCAB, n - 4, dtype=np.int32)]),
                loss_mask=mask,
                logprobs=(-3.7 * mask).astype(np.float32),
                oldest=START,
                newest=START,
                stop=StopReason.EOS,
            )
        )
    return Group(id=f"g{number}", prompt=prompt, samples=tuple(samples))


def batch(step: int, groups: int = 4, ranks: int = 2) -> StepBatch:
    """Groups in the object store, two samples of each for each rank."""
    rows: list[list[Share]] = [[] for _ in range(ranks)]
    for number in range(groups):
        group = drawn_group(100 * step + number)
        ref = ray.put(group)
        for rank in range(ranks):
            mine = range(rank, 4, ranks)
            credits = tuple(Credit(sample_index=i, advantage=i - 1.5, weight=0.01) for i in mine)
            rows[rank].append(Share(group_id=group.id, group=ref, credits=credits, tokens=40))
    return StepBatch(step=step, rows=tuple(tuple(row) for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("m") / "tiny")


@pytest.fixture(scope="module")
def group(ray_session: None, folder: str) -> Iterator[LearnerGroup]:
    learner = LearnerGroup(CONFIG)
    wait(learner.start())
    yield learner
    learner.close()


def spec(folder: str, **changes: Any) -> LearnerSpec:
    return LearnerSpec(model_folder=folder, config=replace(CONFIG, **changes), objective=Grpo())


@dataclass(frozen=True)
class Packing:
    """An `Outgoing` whose ticket is the buckets themselves."""

    def offer(self, state: Iterable[tuple[str, torch.Tensor]], step: int, bases: Collection[str]) -> Offered:
        manifest, buckets = pack(state, step, 2**20)
        assert bases == {""}
        return Offered(dense=manifest, ways=((manifest, buckets),), metrics={})


def test_groups_are_opened_in_the_ranks_and_the_step_is_reported(group: LearnerGroup, folder: str) -> None:
    wait(group.setup(spec(folder)))
    work = batch(0)
    report = wait(group.step(work))
    drawn = sum(g.samples[i].drawn_tokens for g in map(drawn_group, range(4)) for i in range(4))
    assert report.tokens == drawn
    assert report.metrics["perf/tokens"] == sum(
        len(g.samples[i].token_ids) for g in map(drawn_group, range(4)) for i in range(4)
    )
    assert report.version.step == 1
    assert report.metrics["policy/lr"] == 1e-2
    assert group.row_tokens == 4 * 40
    assert 0 < report.metrics["mismatch/kl"] < report.metrics["mismatch/max"]


def test_a_stage_follows_another_in_the_same_processes(group: LearnerGroup, folder: str) -> None:
    wait(group.setup(spec(folder)))
    before = [pid_of(phase) for phase in ray.get([rank.phase.remote() for rank in group.ranks])]
    first = wait(group.step(batch(0)))
    wait(group.setup(spec(folder, backend="torch", zero=0)))
    again = wait(group.step(batch(0)))
    after = [pid_of(phase) for phase in ray.get([rank.phase.remote() for rank in group.ranks])]
    assert before == after
    assert again.metrics["policy/loss"] == pytest.approx(first.metrics["policy/loss"], abs=1e-6)
    assert again.metrics["policy/grad_norm"] == pytest.approx(first.metrics["policy/grad_norm"], rel=1e-5)


def test_one_rank_offers_the_weights_the_probe_computes_with(group: LearnerGroup, folder: str) -> None:
    wait(group.setup(spec(folder, zero=3)))
    wait(group.step(batch(0)))
    offers = ray.get([rank.publish.remote(1, Packing(), {""}) for rank in group.ranks])
    assert offers[1] is None
    manifest, buckets = offers[0].ways[0]
    assert manifest.version.step == 1
    probe = [np.arange(1, 9, dtype=np.int32)]
    ours = wait(group.logprobs(probe))["learner"]
    assert np.allclose(ours, logprobs_of(folder, manifest, buckets, probe[0]), atol=1e-5)


def logprobs_of(
    folder: str, manifest: WeightManifest, buckets: list[np.ndarray], tokens: np.ndarray
) -> np.ndarray:
    """What Hugging Face computes with the published bytes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == {entry.name for entry in manifest.tensors}
    with torch.no_grad():
        for entry in manifest.tensors:
            raw = buckets[entry.bucket][entry.offset_bytes : entry.offset_bytes + entry.size_bytes]
            parameters[entry.name].copy_(
                torch.frombuffer(bytearray(raw), dtype=torch.float32).view(entry.shape)
            )
        ids = torch.from_numpy(tokens.astype(np.int64))
        logp = model(ids[None]).logits[0, :-1].log_softmax(-1)
        return logp.gather(-1, ids[1:, None]).squeeze(-1).numpy()


def test_an_exported_model_loads_and_computes_the_same(
    group: LearnerGroup, folder: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    wait(group.setup(spec(folder)))
    wait(group.step(batch(0)))
    wait(group.export_hf(str(tmp_path / "out")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(1, 9)
    with torch.no_grad():
        logp = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
    ours = wait(group.logprobs([np.arange(1, 9, dtype=np.int32)]))["learner"]
    assert np.allclose(logp.numpy(), ours, atol=1e-5)
    assert not (tmp_path / "out" / ".model.safetensors.partial").exists()


def test_wrong_numbers_of_rows_and_ranks_are_refused(group: LearnerGroup, folder: str) -> None:
    wait(group.setup(spec(folder)))
    with pytest.raises(LearnerError, match="3 rows for 2 ranks"):
        wait(group.step(batch(0, ranks=3)))
    with pytest.raises(LearnerError, match="a stage for 3 ranks"):
        wait(group.setup(spec(folder, ranks=3)))


@ray.remote(num_cpus=0)
def never_drawn() -> None:
    """A group whose worker hangs."""
    time.sleep(600)


def pid_of(phase: str) -> int:
    found = re.search(r"process (\d+)", phase)
    assert found
    return int(found.group(1))


def test_a_rank_killed_within_a_step_is_named_in_bounded_time_and_the_group_can_start_again(
    group: LearnerGroup, folder: str, tmp_path: Path
) -> None:
    wait(group.setup(spec(folder)))
    wait(group.step(batch(0)))
    wait(group.save(str(tmp_path), {}))
    expected = wait(group.step(batch(1)))
    victim = pid_of(ray.get(group.ranks[1].phase.remote()))

    async def killed_while_stepping() -> None:
        # Rank 1 waits for a reference that nobody fulfils; rank 0 waits for rank 1.
        work = batch(2)
        never = never_drawn.remote()
        row = (replace(work.rows[1][0], group=never), *work.rows[1][1:])
        stuck = asyncio.ensure_future(group.step(replace(work, rows=(work.rows[0], row))))
        await asyncio.sleep(0.5)
        os.kill(victim, signal.SIGKILL)
        try:
            await stuck
        finally:
            ray.cancel(never, force=True)

    start = time.monotonic()
    with pytest.raises(LearnerError) as error:
        wait(killed_while_stepping())
    assert time.monotonic() - start < 60
    message = str(error.value)
    assert "rank 1 died" in message
    assert "learner.step 2" in message
    assert "g200, g201" in message
    with pytest.raises(LearnerError, match="broken"):
        wait(group.step(batch(3)))
    wait(group.start())
    wait(group.setup(spec(folder)))
    wait(group.load(str(tmp_path)))
    again = wait(group.step(batch(1)))
    assert again.metrics["policy/loss"] == expected.metrics["policy/loss"]


def test_a_frozen_rank_is_told_from_a_slow_one(group: LearnerGroup, folder: str) -> None:
    wait(group.setup(spec(folder)))
    assert wait(group.examine()) == ""
    before = group._config
    group._config = GroupConfig(ranks=2, heartbeat_s=0.2, silence_deadline_s=2.0)
    victim = pid_of(ray.get(group.ranks[1].phase.remote()))
    os.kill(victim, signal.SIGSTOP)
    start = time.monotonic()
    try:
        with pytest.raises(LearnerError, match=r"learner.step 1.*rank 1 has been silent for 2 s") as error:
            wait(group.step(batch(1)))
    finally:
        os.kill(victim, signal.SIGCONT)
        group._config = before
    assert time.monotonic() - start < 30
    assert "rank 0: waiting for the other ranks" in str(error.value), "who waits for it"
    assert "silent" in wait(group.examine())
    wait(group.start())
    assert wait(group.examine()) == ""


def test_a_rank_that_hangs_passes_the_deadline_with_every_ranks_phase(
    group: LearnerGroup, folder: str
) -> None:
    wait(group.setup(spec(folder)))
    group._config = GroupConfig(ranks=2, step_deadline_s=3.0)
    work = batch(5)
    never = never_drawn.remote()
    row = (replace(work.rows[1][0], group=never), *work.rows[1][1:])
    start = time.monotonic()
    with pytest.raises(DeadlineError) as error:
        wait(group.step(replace(work, rows=(work.rows[0], row))))
    assert time.monotonic() - start < 30
    ray.cancel(never, force=True)
    assert "rank 1 is not done after 3 s: opening references in " in str(error.value), "rank 0 waits for it"
    assert "rank 1: opening references" in str(error.value)
    assert "g500" in str(error.value)
