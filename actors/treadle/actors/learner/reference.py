"""The reference policy of a KL term: a frozen copy that may be renewed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from treadle.actors.learner.config import LearnerConfig
from treadle.actors.learner.packing import PackedBatch
from treadle.actors.learner.policy import load_policy


class Reference:
    """A replica on every rank, in the learner's dtype. `step` is the version whose weights it holds; its age
    at step s is s - `step`."""

    def __init__(self, folder: str, config: LearnerConfig, device: torch.device) -> None:
        self.step = 0
        self._every = config.replace_reference_every
        self._device = device
        self._policy = load_policy(folder, dtype=config.dtype, packing=config.packing).to(device)
        self._policy.requires_grad_(False)
        self._weights = {
            name.removeprefix("model."): tensor for name, tensor in self._policy.named_parameters()
        }

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch, temperature: float) -> Tensor:
        """[n] fp32, of the batch's targets."""
        return self._policy(batch, temperature).logprobs

    def due(self, step: int) -> bool:
        """Whether the reference becomes the policy after the step that made version `step`."""
        return self._every > 0 and step % self._every == 0

    @torch.no_grad()
    def replace(self, state: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Takes over the policy's full weights. Collective where `state` is gathered from all ranks."""
        for name, tensor in state:
            self._weights[name].copy_(tensor)
        self.step = step

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._weights.items():
            yield name, tensor.detach().cpu()
