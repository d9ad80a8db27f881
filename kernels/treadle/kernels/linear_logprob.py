"""Log-probability and entropy of target tokens straight from hidden states, without the full logits.

For a vocabulary of 152k, fp32 logits of 16k tokens take 10 GB and their softmax as much again: the largest
tensors of a policy-gradient step. Here the tokens go by in chunks, both forward and backward; a chunk's
logits live only while it is processed. The gradients are exact, not an approximation.

Letters: N tokens, D hidden size, V vocabulary. With z = (h Wᵀ + b) / τ:
    logprob_t = z_t − logsumexp(z),      H = logsumexp(z) − Σ p z,
    ∂logprob_t/∂z = 1[t] − p,            ∂H/∂z = −p · (log p + H).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS_CPU = 2**22  # 16 MiB of fp32 logits: near the last-level cache
CHUNK_ELEMENTS_CUDA = 2**26  # 256 MiB: large enough to keep the matrix multiplication busy


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_elements: int = 0,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] of `targets` and entropies [N] of the distributions, in nats.

    hidden [N, D], weight [V, D], bias [V] or None, targets [N] int64. Logits are divided by `temperature`.
    Results and all sums are fp32 (fp64 for fp64 input). `chunk_elements` bounds the logits held at a time
    (0 chooses by device). Entropy carries a gradient only with `entropy_gradient`.
    Raises ValueError for mismatched shapes or a temperature that is not positive.
    """
    _check(hidden, weight, targets, bias, temperature)
    if chunk_elements <= 0:
        chunk_elements = CHUNK_ELEMENTS_CUDA if hidden.is_cuda else CHUNK_ELEMENTS_CPU
    rows = max(1, chunk_elements // weight.shape[0])
    logprobs, entropy = _LinearLogprob.apply(
        hidden, weight, bias, targets, temperature, rows, entropy_gradient
    )
    return logprobs, entropy


def linear_logprob_eager(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The twin: same result from full [N, V] logits, differentiated by autograd (entropy included)."""
    _check(hidden, weight, targets, bias, temperature)
    logits = _logits(hidden, weight, bias, temperature)
    logp = torch.log_softmax(logits, dim=-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float) -> None:
    n, d = hidden.shape
    v = weight.shape[0]
    if weight.shape != (v, d) or targets.shape != (n,) or (bias is not None and bias.shape != (v,)):
        raise ValueError(
            f"linear_logprob: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, "
            f"targets {tuple(targets.shape)}; need [N, D], [V, D], [N]"
        )
    if not temperature > 0:
        raise ValueError(f"linear_logprob: temperature={temperature} must be > 0")


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the product kept in the dtype of sums, not rounded to bf16 on the way out."""
    dtype = _sum_dtype(a.dtype)
    if a.dtype == b.dtype == dtype:
        return a @ b
    if a.is_cuda and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[n, V] in the dtype of sums, divided by the temperature."""
    logits = _matmul(hidden, weight.t())
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    return logits if temperature == 1.0 else logits / temperature


class _LinearLogprob(torch.autograd.Function):
    """Saves the inputs and two numbers per token; logits are made again in the backward pass.

    `weight` is saved as the leaf itself, so that an optimizer which re-materialises parameters before the
    backward pass (ZeRO-3 gathers a module's parameters again) is seen here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        rows: int,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        n = hidden.shape[0]
        dtype = _sum_dtype(hidden.dtype)
        logprobs, entropy, lse = (torch.empty(n, dtype=dtype, device=hidden.device) for _ in range(3))
        head = _castable(weight, hidden)
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], head, bias, temperature)
            lse[part] = torch.logsumexp(logits, dim=-1)
            logp = logits.sub_(lse[part, None])
            logprobs[part] = logp.gather(-1, targets[part, None]).squeeze(-1)
            entropy[part] = logp.exp().mul_(logp).sum(-1).neg_()
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy if entropy_gradient else None)
        ctx.temperature, ctx.rows = temperature, rows
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype = lse.dtype
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
        d_bias = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device) if need_bias else None
        head = _castable(weight, hidden)
        for start in range(0, hidden.shape[0], ctx.rows):
            part = slice(start, start + ctx.rows)
            d_logits = _d_logits(
                _logits(hidden[part], head, bias, ctx.temperature),
                targets[part],
                lse[part],
                grads[0][part],
                None if entropy is None else (entropy[part], grads[1][part]),
            ).div_(ctx.temperature)
            if d_hidden is not None:
                d_hidden[part] = _matmul(d_logits.to(head.dtype), head)
            if d_weight is not None:
                d_weight.addmm_(d_logits.t(), hidden[part].to(dtype))
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            *(None,) * 4,
        )


def _castable(weight: Tensor, hidden: Tensor) -> Tensor:
    """The head in the dtype it is multiplied in, converted once per pass instead of once per chunk."""
    return weight if hidden.is_cuda else weight.to(_sum_dtype(hidden.dtype))


def _d_logits(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    d_logprob: Tensor,
    entropy: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """∂loss/∂z [n, V] of a chunk, in place of the chunk's logits. `entropy` is (H, ∂loss/∂H) or None."""
    logp = logits.sub_(lse[:, None])
    if entropy is None:
        d_logits = logp.exp_().mul_(-d_logprob[:, None])
    else:
        h, d_h = entropy
        p = logp.exp()
        d_logits = logp.add_(h[:, None]).mul_(-d_h[:, None]).sub_(d_logprob[:, None]).mul_(p)
    return d_logits.scatter_add_(-1, targets[:, None], d_logprob[:, None].to(d_logits.dtype))
