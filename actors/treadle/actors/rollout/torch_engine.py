"""The torch engine: any Hugging Face decoder on a CPU or one GPU, drawn by continuous batching.

The promise: a sample's tokens and log-probabilities depend on the weights, its prompt, its index, its
sampling settings and its issue's version, and on nothing else: not on the worker, the slot, the neighbours,
or when it was admitted. What keeps it:

- token t of a sample is drawn with the t-th uniform of its own seed, by inverse CDF;
- a forward has a multiple of `row_block` rows; matrix products of that shape give a row the same bits at
  every place and for every number of blocks. This is a property of the machine's matrix kernels, so it is
  checked when a model is loaded; where it does not hold, every forward has all slots;
- attention keeps each row in its own small product over its own cache (see `kv_cache`);
- a prompt is prefilled at a padded length that depends on it alone, and its G samples start from copies of
  the same K and V; its last token is fed by the first decode step like every later one.

Weights adopted between two steps: unfinished rows go on from their prefix, prefilled with the new weights.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.engines import FinishedSample, check_fits
from treadle.actors.rollout.hf_model import HfModel, States
from treadle.actors.rollout.independence import rows_are_independent
from treadle.actors.rollout.kv_cache import SlotCache
from treadle.actors.rollout.rows import Row, Rows
from treadle.actors.rollout.sampling import draw
from treadle.actors.rollout.stopping import Stops
from treadle.platform.contracts import Engine, EngineSample
from treadle.platform.errors import RolloutError
from treadle.platform.records import Issue, StopReason, WeightVersion

_log = logging.getLogger(__name__)


def build(config: RolloutConfig, model_folder: str, version: WeightVersion) -> Engine:
    """The registry's entry."""
    torch.set_num_threads(config.threads)
    return TorchEngine(config, HfModel(config, model_folder), version)


@dataclass(slots=True, kw_only=True)
class _Queued:
    """An issue with samples that have no slot yet. `prefix` is the prompt's K and V, without its last
    token."""

    issue: Issue
    next_index: int = 0
    prefix: States | None = None


class TorchEngine:
    """Implements `contracts.Engine`."""

    def __init__(self, config: RolloutConfig, model: HfModel, version: WeightVersion) -> None:
        self.version = version
        self._config = config
        self._model = model
        self._stops = Stops(model.tokenizer, model.eos, model.vocabulary, config.device)
        self._queue: deque[_Queued] = deque()
        self._cache = SlotCache(config.slots, config.kv_step_tokens)
        self._rows = Rows(config.slots, config.max_context_tokens, config.device)
        with torch.inference_mode():
            self._block = self._row_block()

    @property
    def idle(self) -> bool:
        return not self._queue and not self._rows.active.any()

    @property
    def row_block(self) -> int:
        """Forwards have a multiple of this many rows: `row_block`, or all slots where rows are not
        independent of how many there are."""
        return self._block

    @property
    def slots_matter(self) -> bool:
        """Whether every forward computes all slots."""
        return self._block != self._config.row_block

    def admit(self, issue: Issue) -> None:
        """Queues all samples of a group. Raises `DataError` naming the prompt when it cannot fit."""
        check_fits(issue, self._config.max_context_tokens, self._model.vocabulary)
        self._queue.append(_Queued(issue=issue))

    @torch.inference_mode()
    def step(self) -> list[EngineSample]:
        """Draws one token for every active row; returns rows that finished. Freed slots are refilled
        first."""
        self._refill()
        n = self._pack()
        if n == 0:
            return []
        rows = self._rows
        positions = rows.positions(n)
        longest = int(rows.lengths[:n].max())
        logits = self._model.decode(rows.newest[:n], positions, longest, self._cache)
        at = positions[:, None] + 1
        tokens, logprobs = draw(
            logits,
            rows.temperature[:n],
            rows.top_p[:n],
            rows.uniforms[:n].gather(1, at)[:, 0],
            bool(rows.nucleus[:n].any()),
        )
        rows.record(tokens, logprobs, at)
        return self._harvest(n, self._stops.classify(rows.rule[:n], tokens).cpu().numpy())

    def adopt(self, version: WeightVersion, tensors: Iterator[tuple[str, torch.Tensor]]) -> str:
        """Replaces the weights and returns their digest. Raises `MismatchError` before anything is
        changed."""
        digest = self._model.replace_weights(tensors)
        self.version = WeightVersion(step=version.step, digest=digest)
        for queued in self._queue:
            queued.prefix = None
        slots = self._rows.occupied()
        with torch.inference_mode():
            for slot, states in zip(
                slots, self._model.prefill([self._rows.prefix(slot) for slot in slots]), strict=True
            ):
                self._cache.put([slot], states)
        return digest

    @torch.inference_mode()
    def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        """Of every token but each sequence's first, at temperature 1, all sequences concatenated."""
        return self._model.logprobs(sequences)

    def _row_block(self) -> int:
        if rows_are_independent(self._model, self._config):
            return self._config.row_block
        self._model.batch_prefill = False
        _log.warning(
            "rollout: on %s a row's bits depend on the number of rows; every forward computes all %d slots",
            self._config.device,
            self._config.slots,
        )
        return self._config.slots

    def _refill(self) -> None:
        """Seats queued samples in free slots, first come first served."""
        free = self._rows.free()
        if not self._queue or not free:
            return
        seats = self._assign(free)
        self._prefill([queued for queued, _ in seats if queued.prefix is None])
        for queued, slots in seats:
            assert queued.prefix is not None
            self._cache.put(slots, queued.prefix)
            rule = self._stops.rule(queued.issue.sampling.stop)
            first = queued.next_index
            rows = [
                Row(issue=queued.issue, index=index, oldest=self.version)
                for index in range(first, first + len(slots))
            ]
            self._rows.seat(slots, rows, rule)
            queued.next_index += len(slots)
        while self._queue and self._queue[0].next_index == self._queue[0].issue.sampling.group_size:
            self._queue.popleft()

    def _assign(self, free: list[int]) -> list[tuple[_Queued, list[int]]]:
        seats = []
        for queued in self._queue:
            if not free:
                break
            wanted = queued.issue.sampling.group_size - queued.next_index
            seats.append((queued, free[:wanted]))
            free = free[wanted:]
        return seats

    def _prefill(self, queued: list[_Queued]) -> None:
        states = self._model.prefill([entry.issue.prompt.token_ids[:-1] for entry in queued])
        for entry, prefix in zip(queued, states, strict=True):
            entry.prefix = prefix

    def _pack(self) -> int:
        """Rows of the next forward: active rows move to the front where that saves a block."""
        occupied = self._rows.occupied()
        if not occupied:
            return 0
        needed = -(-len(occupied) // self._block) * self._block
        if occupied[-1] < needed:
            return needed
        sources = [slot for slot in occupied if slot >= needed]
        targets = [slot for slot in self._rows.free() if slot < needed][: len(sources)]
        self._cache.move(sources, targets, int(self._rows.lengths[sources].max()))
        self._rows.move(sources, targets)
        return needed

    def _harvest(self, n: int, kinds: NDArray[np.int8]) -> list[EngineSample]:
        rows = self._rows
        full = rows.lengths[:n] >= rows.limits[:n]
        finished: list[EngineSample] = []
        for slot in np.flatnonzero(rows.active[:n] & ((kinds != 0) | full)).tolist():
            stop = self._stop_reason(slot, int(kinds[slot]), bool(full[slot]))
            if stop is not None:
                finished.append(self._finish(slot, stop))
        return finished

    def _stop_reason(self, slot: int, kind: int, full: bool) -> StopReason | None:
        row = self._rows.members[slot]
        assert row is not None
        reason = None
        if kind:
            reason = self._stops.reason(kind, row.issue.sampling.stop, self._rows.completion(slot))
        return reason or (StopReason.LENGTH if full else None)

    def _finish(self, slot: int, stop: StopReason) -> EngineSample:
        row = self._rows.members[slot]
        assert row is not None
        sample = self._rows.sample(slot, self.version, stop)
        if not np.isfinite(sample.logprobs).all():
            raise RolloutError(
                f"rollout/draw: {row.issue.id} sample {row.index} has a log-probability that is not finite "
                f"under version {self.version.step}.",
                "The weights hold NaN or infinity, or float16 overflows: look at the learner's last step.",
            )
        text = self._stops.text(sample.token_ids[sample.loss_mask].tolist())
        self._rows.vacate(slot)
        return FinishedSample(issue_id=row.issue.id, sample=sample, text=text)
