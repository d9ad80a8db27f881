"""What a rank needs of its model and optimizer, beyond `contracts.LearnerBackend`: state that outlives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from treadle.actors.learner.config import LearnerConfig
from treadle.actors.learner.policy import PolicyModel
from treadle.platform.contracts import LearnerBackend
from treadle.platform.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterState:
    """Everything AdamW knows about one parameter, whole (not a rank's part), fp32 on the CPU, [parameter]."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


ReadState = Callable[[str], ParameterState]


class RankBackend(LearnerBackend, Protocol):
    """One rank's trainer. All methods are collective: every rank calls them, in the same order.

    `updates` counts the optimizer updates so far (AdamW's bias correction depends on it), skipped ones not.
    """

    policy: PolicyModel
    updates: int

    def master_state(self) -> Iterator[tuple[str, ParameterState]]:
        """State of every parameter by Hugging Face name, in the model's order, on every rank."""
        ...

    def load_master_state(self, read: ReadState, updates: int) -> None:
        """Takes over weights and moments; the model computes with them from here on."""
        ...

    def close(self) -> None:
        """Frees model and optimizer, so that another model can be set up in this process."""
        ...


def build_backend(policy: PolicyModel, config: LearnerConfig, device: torch.device) -> RankBackend:
    """The backend `learner.backend` names, for a process whose process group is up."""
    if config.backend == "torch":
        from treadle.actors.learner.torch_backend import TorchBackend

        return TorchBackend(policy, config, device)
    if config.backend == "deepspeed":
        from treadle.actors.learner.deepspeed_backend import DeepSpeedBackend

        return DeepSpeedBackend(policy, config, device)
    raise ConfigError(f"learner.backend={config.backend} is unknown.", "Use deepspeed or torch.")


def adamw(parameters: list[tuple[str, nn.Parameter]], config: LearnerConfig) -> torch.optim.AdamW:
    """AdamW over (name, parameter). Weight decay pulls matrices only: shrinking a norm's gain or a bias
    changes the function without regularising it."""
    matrices = [p for _, p in parameters if p.ndim > 1]
    vectors = [p for _, p in parameters if p.ndim <= 1]
    if config.weight_decay == 0:
        groups = [{"params": [p for _, p in parameters], "weight_decay": 0.0}]
    else:
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def empty_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, updates: int) -> None:
    """Gives `parameter` AdamW's state as it is before any update, but counting `updates`."""
    optimizer.state[parameter] = {
        "step": torch.tensor(float(updates), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
