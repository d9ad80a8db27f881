"""One rank of the learner: its samples in, its part of the step out. Plain Python; the Ray actor is a shell.

Every public method is collective: all ranks call it with the same arguments (but for their own row).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from treadle.actors.learner import checkpoint
from treadle.actors.learner.backend import build_backend
from treadle.actors.learner.export import export_folder
from treadle.actors.learner.figures import RankReport
from treadle.actors.learner.onednn import use_onednn
from treadle.actors.learner.packing import pack
from treadle.actors.learner.policy import load_policy
from treadle.actors.learner.process_group import device_of_rank
from treadle.actors.learner.reference import Reference
from treadle.actors.learner.samples import Resolver, train_samples
from treadle.actors.learner.stepping import LearnerSpec, Stage, Step
from treadle.platform.errors import LearnerError
from treadle.platform.failpoints import failpoint
from treadle.platform.records import Json, Share, TrainSample


class LearnerRank:
    """A rank in a process whose process group is up; without one it is the only rank.

    `phase` says what it is doing, for whoever waits for it. `version` counts the steps of the stage.
    """

    def __init__(self, rank: int, resolve: Resolver) -> None:
        self.rank = rank
        self.phase = "idle"
        self.version = 0
        self._resolve = resolve
        self._loaded: Stage | None = None

    @property
    def _stage(self) -> Stage:
        if self._loaded is None:
            raise LearnerError(f"learner rank {self.rank} has no model.", "Call setup first.")
        return self._loaded

    def setup(self, spec: LearnerSpec) -> int:
        """Loads a stage's model, dropping the one before; returns its number of trained parameters."""
        self.phase = "setup: loading the model"
        failpoint("learner.before_setup", str(self.rank))
        config = spec.config
        config.check()
        self.close()
        torch.set_num_threads(config.threads)
        device = device_of_rank(config.gpus)
        policy = load_policy(
            spec.model_folder,
            dtype=config.dtype,
            packing=config.packing,
            checkpointing=config.activation_checkpointing,
            # ZeRO-3 frees weights between forward and backward, which only re-entrant recomputation allows.
            reentrant=config.backend == "deepspeed" and config.zero == 3,
        )
        if device.type == "cpu":
            use_onednn(policy)
        parameters = sum(p.numel() for _, p in policy.named_weights())
        reference = None
        if spec.objective.needs_reference:
            reference = Reference(spec.reference_folder or spec.model_folder, config, device)
        self.phase = "setup: starting the backend"
        backend = build_backend(policy, config, device)
        self._loaded = Stage(spec=spec, backend=backend, reference=reference, device=device)
        self.version = 0
        self.phase = "idle"
        return parameters

    def close(self) -> None:
        """Frees model, optimizer and reference."""
        if self._loaded is not None:
            self._loaded.backend.close()
            self._loaded = None
            gc.collect()

    def step(self, row: Sequence[Share | TrainSample], step: int, temperature: float) -> RankReport:
        """Trains on this rank's row and makes version step+1 together with the other ranks.

        A non-finite loss or gradient norm on any rank leaves the weights of all as they were; the report's
        `skipped` says which. Raises LearnerError for a temperature that is not positive.
        """
        if temperature <= 0:
            raise LearnerError(
                f"learner step {step}: temperature={temperature} leaves no distribution to train.",
                "Train on samples drawn at a temperature above 0.",
            )
        start = time.perf_counter()
        self.phase = "opening references"
        failpoint("learner.before_step", str(self.rank))
        samples = train_samples(row, self._resolve)
        running = Step(self._stage, step, temperature, self._say)
        grad_norm, skipped = running.run(samples)
        self.version = step + 1
        self._renew_reference()
        figures = running.figures
        self.phase = "idle"
        return RankReport(
            loss=running.loss,
            tokens=figures.tokens,
            sequence_tokens=sum(len(sample.token_ids) for sample in samples),
            microbatches=figures.microbatches,
            sums=figures.sums(),
            maxima=figures.maxima(),
            grad_norm=grad_norm,
            lr=self._stage.config.lr_at(step),
            skipped=skipped,
            wall_s=time.perf_counter() - start,
        )

    def _say(self, phase: str) -> None:
        self.phase = phase

    def _renew_reference(self) -> None:
        reference = self._stage.reference
        if reference is not None and reference.due(self.version):
            self.phase = "renewing the reference policy"
            reference.replace(self._stage.backend.full_state(), self.version)

    @torch.no_grad()
    def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        """For every sequence of T tokens the T-1 log-probabilities of each token given those before it, at
        temperature 1, concatenated in the given order. Collective under ZeRO-3 only."""
        self.phase = "probe"
        failpoint("learner.before_probe", str(self.rank))
        samples = [_probe_sample(tokens) for tokens in sequences]
        values: dict[int, NDArray[np.float32]] = {}
        for batch in pack(samples, self._stage.config.max_tokens_per_microbatch):
            output = self._stage.backend.model(batch.to(self._stage.device), 1.0)
            parts = output.logprobs.float().cpu().split(list(batch.layout.lengths))
            values.update({i: part.numpy() for i, part in zip(batch.samples, parts, strict=True)})
        self.phase = "idle"
        return np.concatenate([np.zeros(0, np.float32), *(values[i] for i in sorted(values))])

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        """The published weights: whole, in the model's dtype, by Hugging Face name, on the CPU."""
        return self._stage.backend.full_state()

    def save(self, folder: str, extra: Mapping[str, Json]) -> None:
        """Writes a checkpoint under `folder`; its files are complete when all ranks have returned."""
        self.phase = "save"
        failpoint("learner.before_save")
        backend, reference = self._stage.backend, self._stage.reference
        checkpoint.write(
            folder,
            backend.master_state(),
            () if reference is None else reference.state(),
            step=self.version,
            updates=backend.updates,
            reference_step=-1 if reference is None else reference.step,
            extra=extra,
            writer=self.rank == 0,
        )
        self._barrier()
        self.phase = "idle"

    def load(self, folder: str) -> Mapping[str, Json]:
        """Takes over a checkpoint of any backend, ZeRO stage and number of ranks; returns its `extra`.

        Raises CheckpointError when it is damaged or of another model.
        """
        self.phase = "load"
        failpoint("learner.before_load", str(self.rank))
        backend, reference = self._stage.backend, self._stage.reference
        reader = checkpoint.Reader(folder)
        reader.check_names(name for name, _ in backend.policy.named_weights())
        backend.load_master_state(reader.state, reader.index.updates)
        self.version = reader.index.step
        if reference is not None and reader.index.reference_step >= 0:
            reference.replace(reader.reference(), reader.index.reference_step)
        self._barrier()
        self.phase = "idle"
        return reader.index.extra

    def export_hf(self, folder: str) -> None:
        """Writes the policy as a Hugging Face folder, which `AutoModelForCausalLM` loads."""
        self.phase = "export"
        failpoint("learner.before_export", str(self.rank))
        export_folder(self._stage.spec.model_folder, folder, self.full_state(), writer=self.rank == 0)
        self._barrier()
        self.phase = "idle"

    def _barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()


def _probe_sample(tokens: NDArray[np.int32]) -> TrainSample:
    zeros = np.zeros(len(tokens), dtype=np.float32)
    mask = np.ones(len(tokens), dtype=np.bool_)
    mask[:1] = False
    return TrainSample(
        token_ids=tokens, loss_mask=mask, advantages=zeros, weights=zeros, behaviour_logprobs=None
    )
