"""Reading and writing the partitioned state of a DeepSpeed engine, whole and by parameter name.

DeepSpeed keeps fp32 weights and moments in flat partitions, one set per rank. Its own checkpoints mirror that
layout; ours must not, so state goes through here. Every function is collective.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from treadle.actors.learner.backend import ParameterState, empty_moments

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroState:
    """State access for one engine at ZeRO stage 0 to 3."""

    def __init__(self, engine: Any, stage: int) -> None:
        self._stage = stage
        self._zero = engine.optimizer  # DeepSpeed's partitioning optimizer; the plain one at stage 0
        self._adamw: torch.optim.Optimizer = self._zero.optimizer if stage else self._zero
        self._flat = _flat_partitions(self._zero) if stage else []
        for partition in self._flat or [p for g in self._adamw.param_groups for p in g["params"]]:
            empty_moments(self._adamw, partition, 0)
        if stage in (1, 2):
            self._zero._lazy_init_hp_params_optimizer_state()

    def count_updates(self, updates: int) -> None:
        """Sets AdamW's update count, which its bias correction uses."""
        for moments in self._adamw.state.values():
            moments["step"].fill_(updates)

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """The parameter as the model computes with it, whole, on the CPU."""
        if self._stage < 3:
            return parameter.detach().cpu()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()

    def get(self, parameter: nn.Parameter) -> ParameterState:
        if self._stage == 0:
            moments = self._adamw.state[parameter]
            whole = [parameter.detach(), *(moments[key] for key in MOMENTS)]
        else:
            whole = [
                safe_get_full_fp32_param(parameter),
                *(safe_get_full_optimizer_state(parameter, key) for key in MOMENTS),
            ]
        weight, exp_avg, exp_avg_sq = (tensor.cpu().float() for tensor in whole)
        return ParameterState(weight=weight, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)

    @torch.no_grad()
    def set(self, parameter: nn.Parameter, state: ParameterState) -> None:
        """Writes this rank's part; the model sees the new weight after `publish_to_model`."""
        if self._stage == 0:
            parameter.copy_(state.weight)
            for key in MOMENTS:
                self._adamw.state[parameter][key].copy_(getattr(state, key))
            return
        device = self._flat[0].device
        # ZeRO-3 slices equal parts of the padded flat parameter, beyond its end on the last rank.
        values = [
            self._padded(parameter, value).to(device)
            for value in (state.weight, state.exp_avg, state.exp_avg_sq)
        ]
        if self._stage == 3:
            self._set_partitions(parameter, values)
            return
        safe_set_full_fp32_param(parameter, values[0])
        for key, value in zip(MOMENTS, values[1:], strict=True):
            safe_set_full_optimizer_state(parameter, value, key)

    def _padded(self, parameter: Any, value: Tensor) -> Tensor:
        if self._stage < 3:
            return value
        parts = torch.distributed.get_world_size()
        size = parameter.partition_numel() * parts
        return torch.nn.functional.pad(value.flatten(), (0, size - value.numel()))

    def _set_partitions(self, parameter: Any, values: list[Tensor]) -> None:
        rank, size = torch.distributed.get_rank(), parameter.partition_numel()
        for key, value in zip((None, *MOMENTS), values, strict=True):
            part = value.narrow(0, rank * size, size)
            self._zero.set_local_hp_param(part, parameter, key)

    @torch.no_grad()
    def publish_to_model(self) -> None:
        """Makes the model compute with the master weights as they are now."""
        if self._stage in (1, 2):
            self._zero.update_lp_params()
            if hasattr(self._zero, "bit16_groups"):
                for group in range(len(self._zero.bit16_groups)):
                    self._zero._update_model_bit16_weights(group)
        elif self._stage == 3:
            self._zero._partition_all_parameters()
            for group in range(len(self._flat)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            kept_whole = self._zero.persistent_parameters
            if kept_whole:
                kept_whole[0].all_gather(kept_whole)


def _flat_partitions(zero: Any) -> list[Tensor]:
    """The rank's flat fp32 partitions, under the name each of DeepSpeed's optimizers gives them."""
    for name in (
        "single_partition_of_fp32_groups",  # stages 1 and 2
        "fp32_groups_flat_partition",  # stage 1 in bf16
        "fp32_partitioned_groups_flat",  # stage 3
    ):
        partitions = getattr(zero, name, None)
        if partitions is not None:
            return list(partitions)
    raise TypeError(f"{type(zero).__name__} keeps its fp32 partitions under an unknown name")
