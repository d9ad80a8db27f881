"""DeepSpeed, ZeRO stage 0 to 3, as a learner backend.

Differences from DeepSpeed's habits, all of them needed for a loss that is a sum over the step: gradients are
summed over ranks, not averaged; accumulation is ended by `apply`, not by a count of micro-batches; the
schedule is ours. A non-finite gradient norm leaves the weights untouched at every stage.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from treadle.actors.learner.backend import ParameterState, ReadState, adamw
from treadle.actors.learner.config import LearnerConfig
from treadle.actors.learner.imports import without
from treadle.actors.learner.policy import PolicyModel

BUCKET_ELEMENTS = 2**28


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and on a CPU without its shared-memory collectives: those compile for minutes when
    the process group starts, and gloo is fast enough within a node."""
    cpu = not torch.cuda.is_available()
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    with without("mlflow"):
        import deepspeed
        from deepspeed.runtime import bf16_optimizer
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    bf16_optimizer.see_memory_usage = _silent  # prints unconditionally
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _silent(*args: object, **kwargs: object) -> None:
    """Says nothing."""


class DeepSpeedBackend:
    """A rank's part of the engine. `model` is the DeepSpeed engine, called like the policy."""

    def __init__(self, policy: PolicyModel, config: LearnerConfig, device: torch.device) -> None:
        deepspeed = import_deepspeed()
        from treadle.actors.learner.zero_state import ZeroState

        self.policy = policy.to(device)
        self.updates = 0
        self._config = config
        self._ranks = dist.get_world_size()
        named = list(self.policy.named_weights())
        self._names = {id(parameter): name for name, parameter in named}
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        engine, *_ = deepspeed.initialize(
            model=self.policy, optimizer=adamw(named, config), config=self._settings(config)
        )
        self.model: nn.Module = engine
        self._engine: Any = engine
        self._state = ZeroState(engine, config.zero)

    def _settings(self, config: LearnerConfig) -> dict[str, Any]:
        elements = sum(p.numel() for p in self.policy.parameters())
        bucket = min(BUCKET_ELEMENTS, elements + 4096)
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_allreduce_op": "mean" if config.zero == 3 else "sum",
            "gradient_clipping": config.grad_clip if config.zero else 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": config.zero,
                "overlap_comm": False,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                "stage3_prefetch_bucket_size": bucket,
            },
            "bf16": {"enabled": config.dtype == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "steps_per_print": None,
        }

    def backward(self, loss: Tensor) -> None:
        # ZeRO-3 can only average over ranks; at the other stages it is told to sum.
        self._engine.backward(loss * self._ranks if self._config.zero == 3 else loss, scale_wrt_gas=False)

    def apply(self, step: int) -> float:
        optimizer = self._engine.optimizer
        for group in optimizer.param_groups:
            group["lr"] = self._config.lr_at(step)
        if self._config.zero == 0:
            norm = self._apply_replicated()
        else:
            self._engine.step()
            norm = float("nan") if optimizer.overflow else float(optimizer._global_grad_norm)
        if math.isfinite(norm):
            self.updates += 1
        return norm

    def _apply_replicated(self) -> float:
        """Stage 0 has neither a guard nor a norm of its own, so its update is made here."""
        self._engine.buffered_allreduce_fallback()
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = bool(torch.isfinite(norm))
        if finite:
            if self._config.grad_clip > 0:
                torch._foreach_mul_(gradients, (self._config.grad_clip / (norm + 1e-6)).clamp(max=1.0))
            self._engine.optimizer.step()
        self._engine.zero_grad()
        return float(norm) if finite else float("nan")

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for parameter in self.policy.parameters():
            if id(parameter) in self._names:
                yield self._names[id(parameter)], parameter

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._named():
            yield name, self._state.weight(parameter)

    def master_state(self) -> Iterator[tuple[str, ParameterState]]:
        for name, parameter in self._named():
            yield name, self._state.get(parameter)

    def load_master_state(self, read: ReadState, updates: int) -> None:
        self.updates = updates
        for name, parameter in self._named():
            self._state.set(parameter, read(name))
        self._state.count_updates(updates)
        self._state.publish_to_model()

    def close(self) -> None:
        self._engine.destroy()
        del self._engine, self.model, self._state
