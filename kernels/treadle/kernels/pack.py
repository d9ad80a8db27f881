"""Many tensors into one bucket and back, in one launch, cast on the way, with a flag per chunk that is ready.

A bucket holds the tensors one after the other, each at a multiple of 256 bytes. In which form:

    copy       as they are
    bf16       fp32 tensors rounded to bf16
    fp8        fp32 or bf16 matrices as e4m3, with an fp32 scale of amax / 448 per block of 128 × 128
    fp8_pow2   the same, with scales rounded up to powers of two

fp8 is quantised from the bf16-rounded value: quantising from fp32 changes nearly every scale with every optimizer
step, from bf16 almost none. Infinities and NaNs do not count for a scale; infinities become ±448, NaNs stay.

A transport may send chunk c as soon as flags[c] equals the epoch of the packing, while later chunks are still packed.
S segments (matrices), C chunks, K scales.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from treadle.kernels import native
from treadle.kernels.native import addresses
from treadle.kernels.pack_eager import pack_eager, unpack_eager
from treadle.kernels.registry import op, writes_only

Form = Literal["copy", "bf16", "fp8", "fp8_pow2"]
FORMS = get_args(Form)
COLUMNS = 7  # of a segment: rows, cols, row step, bytes per element, offset, first scale, first tile
TILE, SIDE, ALIGNMENT_BYTES = 16384, 128, 256


class Packing:
    """The layout of a bucket for tensors of given shapes, strides and dtypes.

    Example:

        packing = Packing(weights, form="fp8")
        bucket, scales, flags = packing.buffers(device)
        packing.pack_(weights, bucket, scales, flags, epoch=1)
        packing.unpack_(targets, bucket, scales)

    Raises `ValueError` for dtypes that the form does not take, for tensors whose columns are not neighbours, and
    for a `chunk_bytes` below 1.
    """

    def __init__(self, tensors: Sequence[Tensor], *, form: Form = "copy", chunk_bytes: int = 1 << 20) -> None:
        if form not in FORMS or chunk_bytes < 1:
            raise ValueError(
                f"pack: form={form!r} must be one of {FORMS}, chunk_bytes={chunk_bytes} at least 1"
            )
        self.form, self.chunk_bytes = FORMS.index(form), chunk_bytes
        self.shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        rows: list[tuple[int, ...]] = []
        self.bucket_bytes = self.scales = self.tiles = 0
        covered: list[tuple[int, int]] = []
        for tensor in tensors:
            _check(tensor, form)
            for matrix in matrices(tensor, self.form):
                self.bucket_bytes = -(-self.bucket_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                count, cols = matrix.shape
                width = matrix.element_size()
                step = cols if count == 1 else matrix.stride(0)
                rows.append((count, cols, step, width, self.bucket_bytes, self.scales, self.tiles))
                size = matrix.numel() * (width if form == "copy" else 2 if form == "bf16" else 1)
                covered.append((self.bucket_bytes, self.bucket_bytes + size))
                blocks = -(-count // SIDE) * -(-cols // SIDE)
                self.scales += blocks if self.form >= 2 else 0
                self.tiles += blocks if self.form >= 2 else -(-matrix.numel() // TILE)
                self.bucket_bytes += size
        self.segments = torch.tensor(rows, dtype=torch.int64).reshape(-1, COLUMNS)
        self.expected = _expected(covered, self.bucket_bytes, chunk_bytes)
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def chunks(self) -> int:
        return self.expected.numel()

    def buffers(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """A bucket uint8, scales [K] fp32 and flags [C] int32. With CUDA the flags lie in pinned host memory, where
        a thread of the host can wait for them."""
        flags = torch.zeros(self.chunks, dtype=torch.int32, pin_memory=device.type == "cuda")
        bucket = torch.empty(self.bucket_bytes, dtype=torch.uint8, device=device)
        return bucket, torch.empty(self.scales, device=device), flags

    def pack_(
        self, tensors: Sequence[Tensor], bucket: Tensor, scales: Tensor, flags: Tensor, *, epoch: int
    ) -> None:
        """Fills the bucket, on the current stream. `epoch` differs from those before it with these flags."""
        self._check(tensors, bucket, scales)
        segments, expected = self._tables(bucket.device)
        given = (segments, self._matrices(tensors), self.tiles, self.form, bucket, scales, expected, flags)
        torch.ops.treadle.pack_(*given, self.chunk_bytes, epoch)

    def unpack_(self, tensors: Sequence[Tensor], bucket: Tensor, scales: Tensor) -> None:
        """Writes the bucket into tensors of the shapes and strides of the packed ones, on the current stream. What
        was rounded is widened to their dtype."""
        self._check(tensors, bucket, scales)
        segments, _ = self._tables(bucket.device)
        torch.ops.treadle.unpack_(segments, self._matrices(tensors), self.tiles, self.form, bucket, scales)

    def _matrices(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(itertools.chain.from_iterable(matrices(tensor, self.form) for tensor in tensors))

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on:
            self._on[device] = self.segments.to(device), self.expected.to(device)
        return self._on[device]

    def _check(self, tensors: Sequence[Tensor], bucket: Tensor, scales: Tensor) -> None:
        if [(tensor.shape, tensor.dtype) for tensor in tensors] != self.shapes:
            raise ValueError("pack: the tensors are not those of the packing; make a new Packing for them")
        steps = [m.stride(0) if len(m) > 1 else m.shape[1] for m in self._matrices(tensors)]
        if steps != self.segments[:, 2].tolist():
            raise ValueError(
                "pack: the tensors' strides are not those of the packing; make a new Packing for them"
            )
        if bucket.numel() < self.bucket_bytes or scales.numel() < self.scales:
            raise ValueError(
                f"pack: the bucket has {bucket.numel()} bytes and {scales.numel()} scales, needed are "
                f"{self.bucket_bytes} and {self.scales}; use Packing.buffers"
            )


def matrices(tensor: Tensor, form: int) -> list[Tensor]:
    """The tensor as matrices with neighbouring columns; as one row where nothing depends on its shape."""
    flat = tensor.detach()
    if tensor.numel() == 0:
        return []
    if tensor.ndim < 2 or (form < 2 and tensor.is_contiguous()):
        return [flat.reshape(1, -1)]
    return list(flat.reshape(-1, *flat.shape[-2:]).unbind()) if tensor.ndim > 2 else [flat]


def _check(tensor: Tensor, form: Form) -> None:
    takes = {"copy": None, "bf16": (torch.float32,)}.get(form, (torch.float32, torch.bfloat16))
    if takes and tensor.dtype not in takes:
        raise ValueError(
            f"pack: form {form} takes {takes}, not {tensor.dtype}; pack such tensors with form='copy'"
        )
    if tensor.is_complex():
        raise ValueError("pack: complex tensors are not supported; pass torch.view_as_real(tensor)")
    if tensor.ndim > 2 and not tensor.is_contiguous():
        raise ValueError(f"pack: {tuple(tensor.shape)} is not contiguous; pass its matrices one by one")
    if tensor.numel() > 1 and tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"pack: the columns of {tuple(tensor.shape)} are not neighbours; pass its transpose")


def _expected(covered: list[tuple[int, int]], bucket_bytes: int, chunk_bytes: int) -> Tensor:
    """[C] int64: how many bytes of each chunk belong to a segment."""
    expected = [0] * -(-bucket_bytes // chunk_bytes)
    for begin, end in covered:
        for chunk in range(begin // chunk_bytes, -(-end // chunk_bytes)):
            expected[chunk] += min(end, (chunk + 1) * chunk_bytes) - max(begin, chunk * chunk_bytes)
    return torch.tensor(expected, dtype=torch.int64)


@op(
    "pack_(Tensor segments, Tensor[] tensors, int tiles, int form, Tensor(a!) bucket, Tensor(b!) scales, "
    "Tensor expected, Tensor(c!) flags, int chunk_bytes, int epoch) -> ()",
    fake=writes_only,
)
def _pack(
    segments: Tensor,
    tensors: Sequence[Tensor],
    tiles: int,
    form: int,
    bucket: Tensor,
    scales: Tensor,
    expected: Tensor,
    flags: Tensor,
    chunk_bytes: int,
    epoch: int,
) -> None:
    """`segments` [S, 7] int64, S `tensors`, `expected` [C] int64: those of a `Packing`."""
    library = native.library(bucket.device)
    if not library:
        pack_eager(segments, tensors, form, bucket, scales)
        flags.fill_(epoch)
        return
    progress = torch.empty_like(expected)
    library.call(
        "pack",
        *(segments, addresses(bucket.device, tensors), len(tensors), tiles, form, bucket, scales),
        *(progress, expected, flags, flags.numel(), chunk_bytes, epoch),
        device=bucket.device,
    )


@op(
    "unpack_(Tensor segments, Tensor(a!)[] tensors, int tiles, int form, Tensor bucket, Tensor scales) -> ()",
    fake=writes_only,
)
def _unpack(
    segments: Tensor, tensors: Sequence[Tensor], tiles: int, form: int, bucket: Tensor, scales: Tensor
) -> None:
    """The same in the other direction."""
    library = native.library(bucket.device)
    if not library:
        unpack_eager(segments, tensors, form, bucket, scales)
        return
    library.call(
        "unpack",
        *(segments, addresses(bucket.device, tensors), len(tensors), tiles, form, bucket, scales),
        device=bucket.device,
    )
