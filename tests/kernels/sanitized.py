"""What runs in the process whose kernels are compiled with sanitizers. Tensors are exact allocations of their own,
so that one byte too many is noticed."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import numpy as np
import torch
from tests.kernels.conftest import ISAS
from tests.kernels.test_delta_damage import VALID, block_of

from treadle.kernels import native
from treadle.kernels.cast_diff import CastDiff
from treadle.kernels.delta import apply_delta_, check_delta, encode_delta, write_delta_
from treadle.kernels.digest import Partial, partial_digest, tensors_digest
from treadle.kernels.errors import DeltaCorrupt
from treadle.kernels.layout import Layout
from treadle.kernels.pack import Packing
from treadle.kernels.plan import Plan
from treadle.kernels.reduce import hierarchical_reduce
from treadle.kernels.streamed_mm import streamed_mm

_malloc = ctypes.CDLL(None).malloc
_malloc.restype, _malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory that ends where the tensor ends; torch's own is rounded up."""
    size = max(1, tensor.numel() * tensor.element_size())
    room = (ctypes.c_uint8 * size).from_address(_malloc(size))
    raw = torch.from_numpy(np.frombuffer(room, np.uint8))
    out = raw[: tensor.numel() * tensor.element_size()].view(tensor.dtype)
    return out.copy_(tensor)


def encoders() -> None:
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
        for n in (1, 31, 8193, 65536, 65537):
            for density in (0.001, 0.05, 1.0):
                raw = torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8)
                old = exact(raw.view(dtype))
                mask = (torch.rand(n) < density).repeat_interleave(dtype.itemsize)
                new = exact((raw ^ (mask * 5).to(torch.uint8)).view(dtype))
                layout = Layout.of([("w", old)])
                for steps in (True, False):
                    none = Partial(0, 0)
                    delta = encode_delta(layout, [new], before=[old], steps=steps, base=none, digest=none)
                    target = exact(old)
                    plan = Plan.direct(layout, [("w", target)])
                    apply_delta_(delta, plan, expected=check_delta(delta, plan))
                    assert torch.equal(target.view(torch.uint8), new.view(torch.uint8))
    for n in (1, 31, 33, 65537):
        master, parameter = exact(torch.randn(n)), exact(torch.zeros(n, dtype=torch.bfloat16))
        CastDiff(Layout.of([("w", parameter)]), [master], [parameter]).step()
        partial_digest("w", 0, parameter)
        tensors_digest([("w", parameter), ("m", master)])


def decoders(rounds: int = 80) -> None:
    rng = np.random.default_rng(1)
    for encoding, valid in VALID.items():
        for turn in range(rounds):
            data = bytearray(
                valid if turn % 3 else rng.integers(0, 256, len(valid) % 997, dtype=np.uint8).tobytes()
            )
            for _ in range(int(rng.integers(0, 6))):
                if data:
                    data[int(rng.integers(len(data)))] = int(rng.integers(256))
            data = data[: int(rng.integers(len(data) + 1))] if turn % 2 else data
            delta, weights, _ = block_of(encoding, bytes(data))
            target = exact(weights)
            plan = Plan.direct(delta.layout, [("w", target)])
            object.__setattr__(delta, "payload", exact(delta.payload))
            try:
                apply_delta_(delta, plan, expected=check_delta(delta, plan))
            except DeltaCorrupt:
                assert torch.equal(target.view(torch.int16), weights.view(torch.int16))
            with contextlib.suppress(DeltaCorrupt):
                write_delta_(delta, plan)


def packers() -> None:
    for form, dtype in (("copy", torch.bfloat16), ("bf16", torch.float32), ("fp8", torch.bfloat16)):
        matrices = [
            exact(torch.randn(r, c).to(dtype).reshape(-1)).view(r, c)
            for r, c in ((1, 1), (129, 127), (3, 300))
        ]
        packing = Packing(matrices, form=form, chunk_bytes=1000)  # type: ignore[arg-type]
        bucket, scales, flags = (exact(t) for t in packing.buffers(torch.device("cpu")))
        packing.pack_(matrices, bucket, scales, flags, epoch=1)
        packing.unpack_(matrices, bucket, scales)
        assert bool((flags == 1).all())
    for dtype in (torch.float32, torch.float16):
        hierarchical_reduce([exact(torch.randn(2049).to(dtype)) for _ in range(3)])


def products() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for m, n, k in ((1, 1, 1), (7, 33, 5), (9, 65, 130)):
            a, b = (
                exact(torch.randn(m * k).to(dtype)).view(m, k),
                exact(torch.randn(k * n).to(dtype)).view(k, n),
            )
            ready = exact(torch.ones(-(-m // 3), dtype=torch.int32))
            out = exact(torch.zeros(m * n, dtype=dtype)).view(m, n)
            streamed_mm(a, b, ready, epoch=1, chunk_rows=3, deadline_s=20, out=out)


def main(path: Path) -> None:
    for isa in ISAS.values():
        try:
            library = native.Library(path, isa)
        except native.KernelError:
            continue  # this processor does not have it
        native.library = lambda device, found=library: found  # type: ignore[misc]
        encoders()
        decoders()
        packers()
        products()
    print("all blocks went through")
