"""One step on one rank: micro-batches, loss, gradient, update.

The loss is Σ weights · token_losses over all tokens of all ranks. Nothing here divides by a number of ranks,
micro-batches or tokens, which is why none of them can change the result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from treadle.actors.learner.backend import RankBackend
from treadle.actors.learner.config import LearnerConfig
from treadle.actors.learner.figures import PREFIX, Figures, mismatch
from treadle.actors.learner.packing import PackedBatch, dummy_batch, pack
from treadle.actors.learner.reference import Reference
from treadle.platform import metric_names as names
from treadle.platform.failpoints import failpoint
from treadle.platform.objectives.base import Objective, TokenInputs
from treadle.platform.records import TrainSample


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """What a stage trains: the model folder it starts from, how, and towards what. The KL reference is the
    starting model unless another folder is named."""

    model_folder: str
    config: LearnerConfig
    objective: Objective
    reference_folder: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What `LearnerSpec` has become on this rank."""

    spec: LearnerSpec
    backend: RankBackend
    reference: Reference | None
    device: torch.device

    @property
    def config(self) -> LearnerConfig:
        return self.spec.config


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A micro-batch with what is fixed before the first update. `old` is None where the policy does not move
    within the step: then it is the detached log-probabilities of the one pass."""

    batch: PackedBatch
    old: Tensor | None  # [n]
    reference: Tensor | None  # [n]


class Step:
    """Runs one step. `say` is told the phase; `figures` and `loss` are the rank's part afterwards."""

    def __init__(self, stage: Stage, step: int, temperature: float, say: Callable[[str], None]) -> None:
        self.figures = Figures()
        self._stage = stage
        self._step = step
        self._temperature = temperature
        self._say = say
        self._losses: list[Tensor] = []

    def run(self, samples: Sequence[TrainSample]) -> tuple[float, str]:
        """The global gradient norm of the last update, and why it was refused (empty if it was not). After a
        refused update the rest of the step's updates is left out: all ranks see the same norm."""
        self._say("packing")
        minibatches = self._minibatches(samples)
        prepared = [[self._prepare(batch) for batch in batches] for batches in minibatches]
        norm = 0.0
        for _ in range(self._stage.config.epochs):
            for batches in prepared:
                norm = self._update(batches)
                if not math.isfinite(norm):
                    return norm, "non-finite gradient norm" if math.isfinite(self.loss) else "non-finite loss"
        return norm, ""

    @property
    def loss(self) -> float:
        """This rank's part of the step's loss, averaged over the passes."""
        if not self._losses:
            return 0.0
        updates = self._stage.config.updates_per_step
        return float(torch.stack(self._losses).sum(dtype=torch.float64)) / updates

    def _minibatches(self, samples: Sequence[TrainSample]) -> list[list[PackedBatch]]:
        """Micro-batches of each mini-batch, equally many on all ranks."""
        config, device = self._stage.config, self._stage.device
        parts = _split(samples, config.minibatches)
        packed = [pack(part, config.max_tokens_per_microbatch) for part in parts]
        counts = torch.tensor([len(batches) for batches in packed], device=device)
        if dist.is_initialized():
            self._say("waiting for the other ranks' batches")
            dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        for batches, count in zip(packed, counts.tolist(), strict=True):
            batches.extend(dummy_batch() for _ in range(max(count, 1) - len(batches)))
        # The weights' denominator is the whole step's; each of m updates sees a part of the batch and gets a
        # loss of the same size as if it were all.
        scale = float(config.minibatches)
        return [
            [replace(batch, weights=batch.weights * scale).to(device) for batch in batches]
            for batches in packed
        ]

    @torch.no_grad()
    def _prepare(self, batch: PackedBatch) -> _Prepared:
        old = reference = None
        if self._stage.config.updates_per_step > 1:
            self._say("old log-probabilities")
            old = self._stage.backend.model(batch, self._temperature).logprobs
        if self._stage.reference is not None:
            self._say("reference log-probabilities")
            reference = self._stage.reference.logprobs(batch, self._temperature)
        return _Prepared(batch=batch, old=old, reference=reference)

    def _update(self, batches: Sequence[_Prepared]) -> float:
        for number, prepared in enumerate(batches):
            self._say(f"forward and backward of micro-batch {number + 1} of {len(batches)}")
            self._stage.backend.backward(self._loss(prepared))
        failpoint("learner.after_backward")
        self._say("reducing gradients and updating")
        norm = self._stage.backend.apply(self._step)
        failpoint("learner.after_optimizer_step")
        return norm

    def _loss(self, prepared: _Prepared) -> Tensor:
        batch = prepared.batch
        output = self._stage.backend.model(batch, self._temperature)
        old = output.logprobs.detach() if prepared.old is None else prepared.old
        result = self._stage.spec.objective.token_losses(
            TokenInputs(
                logprobs=output.logprobs,
                old_logprobs=old,
                behaviour_logprobs=batch.behaviour_logprobs,
                ref_logprobs=prepared.reference,
                advantages=batch.advantages,
                sequence=batch.sequence,
                n_sequences=batch.n_sequences,
            )
        )
        loss = (batch.weights * result.losses).sum()
        if failpoint("learner.poisoned_loss"):
            loss = loss * torch.nan
        if not batch.is_dummy:
            self._count(batch, output.entropy, old, result.metrics, loss)
        # A loss of NaN or infinity need not reach every gradient; made to, the guard on the gradient norm
        # stops all ranks together without a further collective.
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)

    def _count(
        self,
        batch: PackedBatch,
        entropy: Tensor,
        old: Tensor,
        metrics: Mapping[str, Tensor],
        loss: Tensor,
    ) -> None:
        self._losses.append(loss.detach())
        figures = self.figures
        figures.tokens += len(batch.targets)
        figures.microbatches += 1
        figures.add(names.POLICY_ENTROPY, entropy)
        for name, values in metrics.items():
            figures.add(PREFIX + name, values)
        if batch.behaviour_logprobs is not None:
            mismatch(figures, old, batch.behaviour_logprobs)


def _split(samples: Sequence[TrainSample], parts: int) -> list[Sequence[TrainSample]]:
    """`parts` runs of neighbouring samples, of nearly equal number; groups stay together where they can."""
    bounds = [len(samples) * i // parts for i in range(parts + 1)]
    return [samples[a:b] for a, b in itertools.pairwise(bounds)]
