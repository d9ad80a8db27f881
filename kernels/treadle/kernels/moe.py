"""Tokens to the rows of their experts and back: the local half of a mixture of experts.

Rows of one expert are neighbours, in the order of (token, choice), and each expert's first row is a multiple of
`align`, so that grouped matrix products need no mask. The way back adds in the order of the choices, in fp32: the
result does not depend on timing. Each is, with weights left out, the gradient of the other.

T tokens, K choices per token, E experts, R rows, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treadle.kernels import native
from treadle.kernels.reduce import KINDS, with_one_nan
from treadle.kernels.registry import op, writes_only


@dataclass(frozen=True, slots=True)
class Routing:
    """Which row each choice gets. Example: `routing = route(router.topk(8).indices, experts=256)`."""

    expert_of: Tensor
    """[T, K] int32, -1 where a choice is masked."""
    row_of: Tensor
    """[T, K] int32, -1 where a choice is masked."""
    offsets: Tensor
    """[E + 1] int32: the first row of each expert; the last entry is the number of rows in use."""
    counts: Tensor
    """[E] int32: rows of each expert without padding."""
    rows: int
    """R, known without asking the device: T·K + E·(align − 1), rounded up."""


def route(expert_of: Tensor, *, experts: int, align: int = 128) -> Routing:
    """A stable counting sort of the choices [T, K] by expert, on their device, which is not waited for. Entries are
    in [-1, experts). Raises `ValueError` for another shape or a number below 1."""
    if expert_of.ndim != 2 or experts < 1 or align < 1:
        raise ValueError(
            f"route: choices {tuple(expert_of.shape)}, experts={experts}, align={align}; need [T, K], >= 1 and >= 1"
        )
    flat = expert_of.reshape(-1).to(torch.int64)
    key = torch.where(flat < 0, experts, flat)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device)
    counts.index_add_(0, key, torch.ones_like(key))
    padded = (counts[:experts] + align - 1) // align * align
    offsets = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
    order = torch.argsort(key, stable=True)
    rank = torch.empty_like(key)
    rank[order] = torch.arange(len(key), device=key.device) - (counts.cumsum(0) - counts)[key[order]]
    row_of = torch.where(flat < 0, -1, offsets[key.clamp(max=experts - 1)] + rank)
    return Routing(
        expert_of=expert_of.to(torch.int32).contiguous(),
        row_of=row_of.to(torch.int32).view(expert_of.shape),
        offsets=offsets.to(torch.int32),
        counts=counts[:experts].to(torch.int32),
        rows=-(-(flat.numel() + experts * (align - 1)) // align) * align,
    )


def moe_permute(hidden: Tensor, routing: Routing, *, flags: Tensor | None = None, epoch: int = 1) -> Tensor:
    """[R, H]: the rows of the experts, zero where there is padding; differentiable.

    hidden [T, H] float32, bfloat16 or float16. flags[e] of `flags` [E] int32 becomes `epoch` as soon as all rows of
    expert e are written, for consumers that do not wait for the stream. Raises `ValueError` for other shapes.
    """
    _check(hidden, routing, routing.row_of.shape[0], "hidden")
    signal = torch.zeros_like(routing.counts) if flags is None else flags
    if signal.dtype != torch.int32 or signal.numel() != routing.counts.numel():
        raise ValueError(f"moe_permute: flags must be int32 [{routing.counts.numel()}]")
    out: Tensor = _Permute.apply(hidden, routing, signal, epoch)
    return out


def moe_unpermute(rows: Tensor, routing: Routing, weights: Tensor) -> Tensor:
    """[T, H]: Σ over the K choices, in order, of weights · rows; masked choices count nothing; differentiable.

    rows [R, H] float32, bfloat16 or float16, weights [T, K] float32. Sums are fp32, rounded once. Raises `ValueError`
    for other shapes and dtypes."""
    _check(rows, routing, routing.rows, "rows")
    if weights.shape != routing.row_of.shape or weights.dtype != torch.float32:
        raise ValueError(f"moe_unpermute: weights must be float32 {tuple(routing.row_of.shape)}")
    out: Tensor = _Unpermute.apply(rows, routing, weights)
    return out


def _check(tensor: Tensor, routing: Routing, count: int, what: str) -> None:
    if tensor.ndim != 2 or len(tensor) != count or tensor.dtype not in KINDS:
        raise ValueError(
            f"moe: {what} is {tensor.dtype} {tuple(tensor.shape)}; need {count} rows of {', '.join(map(str, KINDS))}"
        )
    if tensor.device != routing.row_of.device:
        raise ValueError(f"moe: {what} is on {tensor.device}, the routing on {routing.row_of.device}")


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, routing: Routing, flags: Tensor, epoch: int) -> Tensor:
        ctx.routing = routing
        out = hidden.new_zeros(routing.rows, hidden.shape[1])
        choices = (routing.row_of, routing.expert_of, routing.counts)
        torch.ops.treadle.scatter_rows_(hidden.contiguous(), *choices, epoch, out, flags)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out = grads[0].new_empty(len(ctx.routing.row_of), grads[0].shape[1])
        torch.ops.treadle.combine_rows_(grads[0].contiguous(), ctx.routing.row_of, None, out)
        return out, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, routing: Routing, weights: Tensor) -> Tensor:
        ctx.routing = routing
        ctx.save_for_backward(rows, weights)
        out = rows.new_empty(len(routing.row_of), rows.shape[1])
        torch.ops.treadle.combine_rows_(rows.contiguous(), routing.row_of, weights.contiguous(), out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights = ctx.saved_tensors
        routing, grad = ctx.routing, grads[0].float()
        token, choice = (routing.row_of >= 0).nonzero(as_tuple=True)
        row = routing.row_of[token, choice].long()
        d_rows, d_weights = torch.zeros_like(rows), torch.zeros_like(weights)
        d_rows[row] = (grad[token] * weights[token, choice, None]).to(rows.dtype)
        d_weights[token, choice] = (grad[token] * rows[row].float()).sum(-1)
        return d_rows, None, d_weights


@op(
    "scatter_rows_(Tensor rows, Tensor row_of, Tensor expert_of, Tensor counts, int epoch, Tensor(a!) out, "
    "Tensor(b!) flags) -> ()",
    fake=writes_only,
)
def _scatter_rows(
    rows: Tensor, row_of: Tensor, expert_of: Tensor, counts: Tensor, epoch: int, out: Tensor, flags: Tensor
) -> None:
    """rows [T, H], row_of and expert_of [T, K], counts and flags [E] int32, out [R, H]; all contiguous."""
    library = native.library(out.device)
    if not library:
        token, choice = (row_of >= 0).nonzero(as_tuple=True)
        out[row_of[token, choice].long()] = rows[token]
        flags.fill_(epoch)
        return
    missing = counts.clone()
    library.call(
        "scatter_rows",
        *(rows, rows.shape[1] * rows.element_size(), row_of, expert_of, row_of.numel(), row_of.shape[1]),
        *(out, missing, flags, flags.numel(), epoch),
        device=out.device,
    )


@op("combine_rows_(Tensor rows, Tensor row_of, Tensor? weights, Tensor(a!) out) -> ()", fake=writes_only)
def _combine_rows(rows: Tensor, row_of: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """rows [R, H], row_of [T, K] int32, weights [T, K] fp32, out [T, H]; all contiguous."""
    library = native.library(out.device)
    if not library:
        out.copy_(combine_eager(rows, row_of, weights))
        return
    sizes = (*row_of.shape, rows.shape[1])
    library.call("combine_rows", rows, KINDS[rows.dtype], row_of, weights, *sizes, out, device=out.device)


def combine_eager(rows: Tensor, row_of: Tensor, weights: Tensor | None) -> Tensor:
    """The twin: choice by choice, in order. A NaN has no sign and no payload."""
    total = torch.zeros(len(row_of), rows.shape[1], device=rows.device)
    for j in range(row_of.shape[1]):
        held = row_of[:, j] >= 0
        part = rows[row_of[held, j].long()].float()
        total[held] += part if weights is None else weights[held, j, None] * part
    return with_one_nan(total, rows.dtype)
