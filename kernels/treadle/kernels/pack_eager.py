"""The twins of pack and unpack in torch operations; arguments are those of the operators in `pack`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treadle.kernels.cast_diff import bf16_bits

SIDE = 128
LARGEST = 448.0  # of e4m3
COPY, BF16, FP8, FP8_POW2 = range(4)


def pack_eager(
    segments: Tensor, tensors: Sequence[Tensor], form: int, bucket: Tensor, scales: Tensor
) -> None:
    for (_, _, _, _, offset, first_scale, _), matrix in zip(segments.tolist(), tensors, strict=True):
        if form == COPY:
            held = matrix.contiguous().reshape(-1).view(torch.uint8)
        elif form == BF16:
            held = bf16_bits(matrix.reshape(-1)).view(torch.uint8)
        else:
            codes, found = quantised(matrix, power_of_two=form == FP8_POW2)
            scales[first_scale : first_scale + found.numel()] = found.reshape(-1)
            held = codes.view(torch.uint8).reshape(-1)
        bucket[offset : offset + held.numel()] = held


def unpack_eager(
    segments: Tensor, tensors: Sequence[Tensor], form: int, bucket: Tensor, scales: Tensor
) -> None:
    for (rows, cols, _, width, offset, first_scale, _), matrix in zip(
        segments.tolist(), tensors, strict=True
    ):
        size = rows * cols * (width if form == COPY else 2 if form == BF16 else 1)
        held = bucket[offset : offset + size]
        if form == COPY:
            bits = matrix.view(torch.uint8) if matrix.stride(-1) == 1 else matrix
            bits.copy_(held.view(rows, -1))
        elif form == BF16:
            wide = held.clone().view(torch.int16).to(torch.int32) << 16
            matrix.copy_(wide.view(torch.float32).view(rows, cols))
        else:
            blocks = (-(-rows // SIDE), -(-cols // SIDE))
            found = scales[first_scale : first_scale + blocks[0] * blocks[1]].view(blocks)
            codes = held.view(torch.float8_e4m3fn).view(rows, cols)
            values = codes.float() * _spread(found, rows, cols)
            matrix.copy_(values if width == 4 else bf16_bits(values).view(torch.bfloat16))


def quantised(matrix: Tensor, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Codes e4m3 [rows, cols] and scales fp32 [⌈rows/128⌉, ⌈cols/128⌉] of an fp32 or bf16 matrix."""
    rows, cols = matrix.shape
    bits = bf16_bits(matrix) if matrix.dtype == torch.float32 else matrix.contiguous().view(torch.int16)
    values = (bits.to(torch.int32) << 16).view(torch.float32)
    padded = torch.zeros(-(-rows // SIDE) * SIDE, -(-cols // SIDE) * SIDE, device=matrix.device)
    padded[:rows, :cols] = torch.where(values.isfinite(), values, 0).abs()
    largest = padded.view(padded.shape[0] // SIDE, SIDE, -1, SIDE).amax(dim=(1, 3))
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    if power_of_two:
        mantissa, exponent = torch.frexp(scales)
        rounded = torch.ldexp(torch.ones_like(scales), torch.where(mantissa > 0.5, exponent, exponent - 1))
        scales = rounded.clamp(min=2.0**-126)
    return (values / _spread(scales, rows, cols)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales


def _spread(scales: Tensor, rows: int, cols: int) -> Tensor:
    """A scale per element."""
    return scales.repeat_interleave(SIDE, 0)[:rows].repeat_interleave(SIDE, 1)[:, :cols]
