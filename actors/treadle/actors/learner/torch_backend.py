"""Plain data parallelism in torch: replicated fp32 master weights, one all-reduce of gradients per update.

Small enough to be checked by eye, and therefore what the DeepSpeed backend is tested against.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from treadle.actors.learner.backend import ParameterState, ReadState, adamw, empty_moments
from treadle.actors.learner.config import LearnerConfig
from treadle.actors.learner.policy import PolicyModel


class TorchBackend:
    """A rank's replica. With fp32 the master weights are the model's; with bf16 they are kept beside them and
    gradients are added up in fp32, micro-batch by micro-batch."""

    def __init__(self, policy: PolicyModel, config: LearnerConfig, device: torch.device) -> None:
        self.policy = policy.to(device)
        self.model: nn.Module = self.policy
        self.updates = 0
        self._config = config
        self._parameters = dict(self.policy.named_weights())
        self._masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self._parameters.items()
        }
        self._optimizer = adamw(list(self._masters.items()), config)
        for master in self._masters.values():
            empty_moments(self._optimizer, master, 0)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    @torch.no_grad()
    def apply(self, step: int) -> float:
        gradients = self._reduced()
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            self._clear()
            return float("nan")
        if self._config.grad_clip > 0:
            scale = (self._config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, scale)
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.lr_at(step)
        self._optimizer.step()
        self._copy_to_model()
        self._clear()
        self.updates += 1
        return float(norm)

    def _reduced(self) -> list[Tensor]:
        """Gradients summed over ranks: one all-reduce of a flat buffer, the gradients become its views."""
        masters = list(self._masters.values())
        flat = torch.cat([(torch.zeros_like(m) if m.grad is None else m.grad).reshape(-1) for m in masters])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat)
        for master, part in zip(masters, flat.split([m.numel() for m in masters]), strict=True):
            master.grad = part.view_as(master)
        return [m.grad for m in masters if m.grad is not None]

    def _copy_to_model(self) -> None:
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                parameter.data.copy_(self._masters[name].data)

    def _clear(self) -> None:
        for master in self._masters.values():
            master.grad = None

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            yield name, parameter.detach().cpu()

    def master_state(self) -> Iterator[tuple[str, ParameterState]]:
        for name, master in self._masters.items():
            moments = self._optimizer.state[master]
            yield (
                name,
                ParameterState(
                    weight=master.detach().cpu(),
                    exp_avg=moments["exp_avg"].cpu(),
                    exp_avg_sq=moments["exp_avg_sq"].cpu(),
                ),
            )

    @torch.no_grad()
    def load_master_state(self, read: ReadState, updates: int) -> None:
        self.updates = updates
        for name, master in self._masters.items():
            state = read(name)
            master.copy_(state.weight)
            moments = self._optimizer.state[master]
            moments["step"].fill_(updates)
            moments["exp_avg"].copy_(state.exp_avg)
            moments["exp_avg_sq"].copy_(state.exp_avg_sq)
        self._copy_to_model()

    def close(self) -> None:
        self._optimizer.state.clear()
        self._masters.clear()
        self._parameters.clear()
