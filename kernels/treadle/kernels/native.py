"""The compiled libraries: which one computes for a device, and how it is called.

The setting `TREADLE_KERNELS` is read once per process:

    (unset)   the CPU library for CPU tensors, the CUDA library for CUDA tensors, the eager twin where one of them
              does not load, with one warning per device
    cuda      both libraries must load
    cpu       the CPU library must load; CUDA tensors use the eager twins
    torch     eager twins everywhere

The libraries are built ahead of time (`kernels/build.py`) and lie beside this file; nothing is compiled here.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treadle.kernels.errors import KernelError

ABI = 2
FOLDER = Path(__file__).parent
SETTING = "TREADLE_KERNELS"

_STATUS = {
    1: "an argument is out of range",
    2: "out of memory",
    3: "no device that this library can use",
}
_CUDA_STATUS = 1000


class Library:
    """One loaded library. Functions are called with tensors, whose addresses they get, integers and None."""

    def __init__(self, path: Path, isa: int = 0) -> None:
        """Raises `KernelError` when the file does not load, has another interface, or cannot compute here. `isa`
        chooses among what the CPU library was compiled for: 0 the best, 1 scalar, 2 AVX2, 3 AVX-512, 4 with VBMI2."""
        try:
            self._functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(
                f"{path.name} does not load ({error}); build it: python kernels/build.py"
            ) from error
        if (found := self._functions.treadle_abi()) != ABI:
            raise KernelError(
                f"{path.name} has interface {found}, not {ABI}; build it: python kernels/build.py"
            )
        if status := self._functions.treadle_ready(isa):
            raise KernelError(f"{path.name} cannot compute here: {_meaning(status)}")
        self._functions.treadle_delta_scratch.restype = ctypes.c_int64
        self._often: dict[str, Any] = {}

    def call(self, name: str, *arguments: Tensor | int | None, device: torch.device) -> None:
        """Calls `treadle_<name>` on `device`: on its current stream, or on as many threads as torch uses.
        The caller keeps the tensors alive; the CUDA allocator does so for work on the current stream. Raises
        `KernelError` with the meaning of a status that is not 0."""
        function = getattr(self._functions, f"treadle_{name}")
        converted = [_converted(argument) for argument in arguments]
        if device.type == "cuda":
            with torch.cuda.device(device):
                lane = torch.cuda.current_stream(device).cuda_stream
                status = function(*converted, ctypes.c_uint64(lane))
        else:
            status = function(*converted, ctypes.c_uint64(torch.get_num_threads()))
        if status:
            raise KernelError(f"treadle_{name}: {_meaning(status)}")

    def call_often(self, name: str, kinds: str, *arguments: int | None) -> None:
        """Like `call` on a CPU, for functions that take microseconds: converting arguments would take as long. They are
        addresses ("p" in `kinds`) and integers ("i")."""
        function = self._often.get(name)
        if function is None:
            function = self._often[name] = getattr(self._functions, f"treadle_{name}")
            numbers = [ctypes.c_void_p if kind == "p" else ctypes.c_int64 for kind in kinds]
            function.argtypes = [*numbers, ctypes.c_uint64]
        if status := function(*arguments, torch.get_num_threads()):
            raise KernelError(f"treadle_{name}: {_meaning(status)}")

    def delta_scratch_bytes(self, blocks: int) -> int:
        return int(self._functions.treadle_delta_scratch(ctypes.c_int64(blocks)))


def library(device: torch.device) -> Library | None:
    """The library that computes for tensors on `device`, or None where the eager twin does."""
    return _library(device.type)


@functools.cache
def _library(device_type: str) -> Library | None:
    setting = os.environ.get(SETTING, "")
    if setting not in ("", "cuda", "cpu", "torch"):
        raise KernelError(f"{SETTING}={setting!r}: set it to cuda, cpu or torch, or leave it unset")
    if setting == "torch" or device_type not in ("cpu", "cuda") or (setting, device_type) == ("cpu", "cuda"):
        return None
    try:
        return Library(FOLDER / f"libtreadle_kernels_{device_type}.so")
    except KernelError as error:
        if setting:
            raise
        warnings.warn(
            f"treadle.kernels: {error}. Eager twins are used for {device_type} tensors: correct, and slow. "
            f"{SETTING}=torch says that this is wanted.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def addresses(device: torch.device, *columns: Sequence[Tensor]) -> Tensor:
    """[n, len(columns)] int64 on `device`: the tensors' addresses, 0 for an empty column."""
    count = max(map(len, columns))
    filled = [[t.data_ptr() for t in column] if column else [0] * count for column in columns]
    table = torch.tensor(filled, dtype=torch.int64).reshape(len(columns), count).t().contiguous()
    # Pinned, the copy is ordered with the stream and does not wait for it.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _converted(argument: Tensor | int | None) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument)


def _meaning(status: int) -> str:
    if status >= _CUDA_STATUS:
        return f"CUDA error {status - _CUDA_STATUS}; a driver older than CUDA 13 reports 35"
    return _STATUS.get(status, f"status {status}")
