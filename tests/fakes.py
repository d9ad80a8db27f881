"""Stand-ins with real behaviour: they keep the contracts, and the contract suites say so."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.engines import FinishedSample
from treadle.actors.rollout.handles import Launch, WorkerDiedError
from treadle.actors.rollout.worker import RolloutWorker, WorkerStatus
from treadle.kernels.digest import state_digest
from treadle.platform.contracts import Engine, EngineSample
from treadle.platform.errors import DataError, MismatchError
from treadle.platform.records import (
    Drawn,
    Issue,
    Ref,
    Sample,
    Staged,
    StopReason,
    WeightManifest,
    WeightVersion,
)
from treadle.platform.seeds import derive_seed, uniforms


class FakeEngine:
    """A policy over `VOCABULARY` letters that ignores its context: token k has the softmax of one weight
    vector "w". Draws one token per row and step, by the same noise rule as every engine; token 0 ends a
    row."""

    VOCABULARY = 12

    def __init__(self, config: RolloutConfig, version: WeightVersion, step_s: float = 0.0) -> None:
        self.version = version
        self.weights = torch.linspace(-1.0, 1.0, self.VOCABULARY)
        self.fail_at_step = -1
        self.most_slots = config.slots  # with more it runs out of memory when it draws
        self.slots_matter = False
        self.poison = ""  # the id of a prompt that ends the engine in the middle of its course
        self.steps = 0
        self._config = config
        self._step_s = step_s
        self._rows: list[tuple[Issue, int, list[int], list[float], WeightVersion]] = []

    @property
    def idle(self) -> bool:
        return not self._rows

    def admit(self, issue: Issue) -> None:
        tokens = len(issue.prompt.token_ids)
        if not tokens or tokens + issue.sampling.max_new_tokens > self._config.max_context_tokens:
            raise DataError(f"rollout/draw: prompt {issue.prompt.id} of {tokens} tokens does not fit.")
        self._rows += [(issue, i, [], [], self.version) for i in range(issue.sampling.group_size)]

    def step(self) -> list[EngineSample]:
        time.sleep(self._step_s)
        self.steps += 1
        if self.steps == self.fail_at_step:
            raise MemoryError("the fake engine ran out of memory")
        if self._config.slots > self.most_slots:
            raise MemoryError(f"the fake engine has memory for {self.most_slots} slots")
        if any(row[0].prompt.id == self.poison and len(row[2]) == 2 for row in self._rows):
            raise MemoryError("the fake engine choked")
        for issue, index, tokens, logprobs, _ in self._rows:
            sampling = issue.sampling
            scores = torch.log_softmax(self.weights / (sampling.temperature or 1.0), 0).double()
            seed = derive_seed(sampling.seed, issue.prompt.id, index, issue.version.step)
            u = uniforms(seed, sampling.max_new_tokens)[len(tokens)]
            drawn = int((scores.exp().cumsum(0) <= u).sum()) if sampling.temperature else int(scores.argmax())
            tokens.append(min(drawn, self.VOCABULARY - 1))
            logprobs.append(float(scores[tokens[-1]]))
        ended = [r for r in self._rows if r[2][-1] == 0 or len(r[2]) == r[0].sampling.max_new_tokens]
        self._rows = [r for r in self._rows if all(r is not e for e in ended)]
        return [self._finished(*row) for row in ended]

    def adopt(self, version: WeightVersion, tensors: Iterator[tuple[str, torch.Tensor]]) -> str:
        given = dict(tensors)
        if set(given) != {"w"} or given["w"].shape != self.weights.shape:
            raise MismatchError(f"rollout/adopt: the fake engine has one tensor w, not {sorted(given)}.")
        self.weights = given["w"].clone()
        self.version = version
        return state_digest([("w", self.weights)])

    def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        scores = torch.log_softmax(self.weights, 0).numpy()
        return np.concatenate([scores[s[1:] % self.VOCABULARY] for s in sequences]).astype(np.float32)

    def _finished(
        self, issue: Issue, index: int, tokens: list[int], logprobs: list[float], oldest: WeightVersion
    ) -> EngineSample:
        prompt = issue.prompt.token_ids
        sample = Sample(
            index=index,
            token_ids=np.concatenate([prompt, np.array(tokens, dtype=np.int32)]),
            loss_mask=np.arange(len(prompt) + len(tokens)) >= len(prompt),
            logprobs=np.array([0.0] * len(prompt) + logprobs, dtype=np.float32),
            oldest=oldest,
            newest=self.version,
            stop=StopReason.EOS if tokens[-1] == 0 else StopReason.LENGTH,
        )
        return FinishedSample(
            issue_id=issue.id, sample=sample, text="".join(chr(ord("a") + t) for t in tokens)
        )


class LocalWorker:
    """A `WorkerHandle` over a worker of this process. `kill` is sudden: calls in flight never see an answer
    of the worker; `freeze` makes it answer nothing any more, as a stopped process would."""

    def __init__(self, worker: RolloutWorker) -> None:
        self.worker = worker
        self.dead: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.frozen = False
        self.gone: Exception | None = None
        self.drawn_ids: list[str] = []
        self.node = ""
        self.kernel_kills = self.resident_bytes = 0

    async def load(self, model_folder: str, version: WeightVersion) -> WeightVersion:
        return await self._alive(self.worker.load(model_folder, version))

    async def draw(self, issue: Issue, min_version_step: int) -> tuple[Drawn, Ref, Ref]:
        self.drawn_ids.append(issue.id)
        summary, group, texts = await self._alive(self.worker.draw(issue, min_version_step))
        return summary, _ready(group), _ready(texts)

    async def stage(self, manifest: WeightManifest, ticket: object) -> Staged:
        return await self._alive(self.worker.stage(manifest, ticket))

    async def flip(self, version: WeightVersion) -> str:
        return await self._alive(self.worker.flip(version))

    async def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        return await self._alive(self.worker.logprobs(sequences))

    async def status(self) -> WorkerStatus:
        if self.frozen:
            await asyncio.sleep(3600)
        if self.gone is not None:
            raise self.gone
        if self.dead.done():
            raise WorkerDiedError("the local worker was killed")
        return dataclasses.replace(
            self.worker.status(),
            node=self.node,
            kernel_kills=self.kernel_kills,
            resident_bytes=self.resident_bytes,
        )

    async def where(self) -> str:
        return "it is a fake that froze"

    def kill(self) -> None:
        if not self.dead.done():
            self.dead.set_result(None)
            self.worker.close()

    async def _alive(self, call):  # type: ignore[no-untyped-def]
        task = asyncio.ensure_future(call)
        await asyncio.wait({task, self.dead}, return_when=asyncio.FIRST_COMPLETED)
        if self.dead.done():
            task.cancel()
            raise WorkerDiedError("the local worker was killed")
        return task.result()


def local_launch(
    config: RolloutConfig,
    build: Callable[[RolloutConfig, str, WeightVersion], Engine],
    found: list[LocalWorker],
) -> Launch:
    """Starts workers in this process and appends each to `found`."""

    def launch(name: str, slots: int) -> LocalWorker:
        sized = dataclasses.replace(config, slots=slots)
        found.append(LocalWorker(RolloutWorker(name, sized, build=build)))
        return found[-1]

    return launch


def _ready(value: object) -> asyncio.Future[object]:
    """An awaitable that has arrived, as an object reference has."""
    future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future


def weights_of(scale: float) -> Mapping[str, torch.Tensor]:
    """Another state for `FakeEngine`."""
    return {"w": torch.linspace(scale, -scale, FakeEngine.VOCABULARY)}
