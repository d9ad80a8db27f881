"""Drawing one token per row, without a loop over rows.

Letters: n rows, V vocabulary.
"""

from __future__ import annotations

import torch


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
    nucleus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [n] int64 and their log-probabilities [n] float32.

    `logits` [n, V], `temperature` and `top_p` [n] float32, `uniform` [n] float64 in [0, 1). A row's token is
    the first whose cumulative probability, in vocabulary order, exceeds its uniform (inverse CDF); at
    temperature 0 it is the most probable one and its log-probability is the one at temperature 1.
    Log-probabilities are of the whole distribution, `top_p` does not renormalise them. `nucleus` says whether
    any `top_p` is below 1.
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    logprobs = torch.log_softmax(scaled, dim=-1)
    weights = logprobs.exp()
    if nucleus:
        weights = torch.where(in_nucleus(weights, top_p), weights, 0.0)
    mass = weights.cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None] * mass[:, -1:]
    drawn = torch.searchsorted(mass, target, right=True).clamp_(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy[:, None], logprobs.argmax(dim=-1, keepdim=True), drawn)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def in_nucleus(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest set of most probable tokens whose mass reaches `top_p`, [n, V] bool (Holtzman et al. 2020,
    "The Curious Case of Neural Text Degeneration", §3.1). Ties go to the lower token id; a row with
    `top_p=1` keeps everything."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
    keep = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    return torch.zeros_like(keep).scatter_(1, order, keep)
