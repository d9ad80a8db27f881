"""Weights for the tests of kernels: every kind of number, at every alignment."""

from __future__ import annotations

import torch
from torch import Tensor

from treadle.kernels.layout import INTEGERS

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.int32,
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_bits(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Every bit pattern is as likely as any other: NaNs, infinities and subnormals included."""
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), generator=generator(seed), dtype=torch.uint8)
    return raw.view(dtype) if numel else torch.empty(0, dtype=dtype)


def misaligned(tensor: Tensor, elements: int = 1) -> Tensor:
    """An equal tensor whose address is `elements` elements beyond a multiple of 64 bytes."""
    room = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)
    room[elements:] = tensor
    return room[elements:]


def changed(tensor: Tensor, where: Tensor, seed: int, *, ulps: int = 0) -> Tensor:
    """A copy in which the elements `where` [n] bool have other bits: any, or at most `ulps` away."""
    out = tensor.clone()
    bits = out.view(INTEGERS[tensor.element_size()])
    count = int(where.sum())
    if ulps:
        step = torch.randint(1, ulps + 1, (count,), generator=generator(seed))
        sign = torch.randint(0, 2, (count,), generator=generator(seed + 1)) * 2 - 1
        bits[where] = (bits[where].to(torch.int64) + step * sign).to(bits.dtype)
    else:
        other = random_bits(count, tensor.dtype, seed).view(bits.dtype)
        bits[where] = torch.where(other == bits[where], other ^ 1, other)
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    width = INTEGERS.get(a.element_size(), torch.int64)
    return torch.equal(a.view(width), b.view(width))
