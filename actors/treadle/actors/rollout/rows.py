"""The torch engine's rows: which sample sits in which slot, and its tokens so far.

Letters: S slots, C context tokens, n rows of one forward (the first n slots).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from treadle.platform.records import Issue, Sample, StopReason, WeightVersion
from treadle.platform.seeds import derive_seed, uniforms


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A sample being drawn. `oldest` is the version its first token is drawn with."""

    issue: Issue
    index: int
    oldest: WeightVersion

    @property
    def prompt_tokens(self) -> int:
        return len(self.issue.prompt.token_ids)


class Rows:
    """State of all slots as arrays. What the host can know it keeps in numpy; what a forward reads or writes
    lies on the device."""

    def __init__(self, slots: int, context_tokens: int, device: str) -> None:
        self.members: list[Row | None] = [None] * slots
        self.lengths = np.ones(slots, dtype=np.int64)  # tokens so far; the newest is not in the cache yet
        self.limits = np.ones(slots, dtype=np.int64)  # length at which a row ends
        self.active = np.zeros(slots, dtype=bool)
        self.nucleus = np.zeros(slots, dtype=bool)
        self.newest = torch.zeros(slots, dtype=torch.int64, device=device)
        self.rule = torch.zeros(slots, dtype=torch.int64, device=device)
        self.temperature = torch.ones(slots, dtype=torch.float32, device=device)
        self.top_p = torch.ones(slots, dtype=torch.float32, device=device)
        # One column beyond the context takes the writes of idle rows.
        self.uniforms = torch.zeros(slots, context_tokens + 1, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(slots, context_tokens + 1, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(slots, context_tokens + 1, dtype=torch.float32, device=device)
        self._device = device

    def free(self) -> list[int]:
        """Slots without a row, lowest first."""
        return np.flatnonzero(~self.active).tolist()

    def occupied(self) -> list[int]:
        return np.flatnonzero(self.active).tolist()

    def seat(self, slots: list[int], rows: list[Row], rule: int) -> None:
        """Puts samples of one issue into free slots, before their first tokens."""
        issue, length = rows[0].issue, rows[0].prompt_tokens
        sampling, limit = issue.sampling, length + issue.sampling.max_new_tokens
        prompt = torch.from_numpy(issue.prompt.token_ids.astype(np.int64)).to(self._device)
        noise = np.stack([_noise(issue, row.index) for row in rows])
        for slot, row in zip(slots, rows, strict=True):
            self.members[slot] = row
        self.lengths[slots], self.limits[slots] = length, limit
        self.active[slots], self.nucleus[slots] = True, sampling.top_p < 1
        self.newest[slots] = prompt[-1]
        self.rule[slots] = rule
        self.temperature[slots] = sampling.temperature
        self.top_p[slots] = sampling.top_p
        self.tokens[slots, :length] = prompt
        self.uniforms[slots, length:limit] = torch.from_numpy(noise).to(self._device)

    def positions(self, n: int) -> torch.Tensor:
        """Where the newest token of each of the first n rows lies, [n]."""
        return torch.from_numpy(self.lengths[:n] - 1).to(self._device)

    def record(self, tokens: torch.Tensor, logprobs: torch.Tensor, at: torch.Tensor) -> None:
        """Takes the drawn tokens [n] and their log-probabilities; `at` [n, 1] is their position."""
        n = len(tokens)
        self.newest[:n] = tokens
        self.tokens[:n].scatter_(1, at, tokens[:, None])
        self.logprobs[:n].scatter_(1, at, logprobs[:, None])
        self.lengths[:n] += self.active[:n]

    def prefix(self, slot: int) -> NDArray[np.int32]:
        """The tokens whose K and V the cache must hold: all but the newest."""
        return self._tokens(slot, 0, int(self.lengths[slot]) - 1)

    def completion(self, slot: int) -> list[int]:
        row = self.members[slot]
        assert row is not None
        return self._tokens(slot, row.prompt_tokens, int(self.lengths[slot])).tolist()

    def sample(self, slot: int, newest: WeightVersion, stop: StopReason) -> Sample:
        """The finished record."""
        row = self.members[slot]
        assert row is not None
        length = int(self.lengths[slot])
        mask = np.arange(length) >= row.prompt_tokens
        logprobs = self.logprobs[slot, :length].cpu().numpy()
        return Sample(
            index=row.index,
            token_ids=self._tokens(slot, 0, length),
            loss_mask=mask,
            logprobs=np.where(mask, logprobs, np.float32(0)),
            oldest=row.oldest,
            newest=newest,
            stop=stop,
        )

    def vacate(self, slot: int) -> None:
        """An idle slot computes a harmless token at position 0 whenever its block is computed."""
        self.members[slot] = None
        self.active[slot] = self.nucleus[slot] = False
        self.lengths[slot] = 1
        self.newest[slot] = self.rule[slot] = 0
        self.temperature[slot] = self.top_p[slot] = 1.0

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Moves whole rows, pairwise, into free slots."""
        for array in (self.lengths, self.limits, self.active, self.nucleus):
            array[targets] = array[sources]
        device_state = (self.newest, self.rule, self.temperature, self.top_p)
        for tensor in (*device_state, self.uniforms, self.tokens, self.logprobs):
            tensor[targets] = tensor[sources]
        for source, target in zip(sources, targets, strict=True):
            self.members[target] = self.members[source]
            self.vacate(source)

    def _tokens(self, slot: int, start: int, end: int) -> NDArray[np.int32]:
        return self.tokens[slot, start:end].to(torch.int32).cpu().numpy().copy()


def _noise(issue: Issue, index: int) -> NDArray[np.float64]:
    """The uniforms of one sample's tokens, [max_new_tokens]: the t-th for the t-th drawn token."""
    sampling = issue.sampling
    seed = derive_seed(sampling.seed, issue.prompt.id, index, issue.version.step)
    return uniforms(seed, sampling.max_new_tokens)
