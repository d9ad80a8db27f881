"""The backends on which every kernel is held against its eager twin."""

from __future__ import annotations

import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from treadle.kernels import native

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "cuda_on_cpu"
ISAS = {"scalar": 1, "avx2": 2, "avx512": 3, "vbmi2": 4}


@pytest.fixture(scope="session")
def build() -> dict[str, Any]:
    """The functions of `kernels/build.py`."""
    return runpy.run_path(str(ROOT / "kernels" / "build.py"))


@pytest.fixture(scope="session")
def cpu_library(build: dict[str, Any]) -> Path:
    """The CPU library, built from the sources as they are."""
    path = build["build_cpu"](build["PACKAGE"], False, print)
    if path is None:
        pytest.skip("needs a C++ compiler for x86-64")
    return path


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA sources, compiled for the CPU: the kernels' logic without a GPU."""
    path = tmp_path_factory.mktemp("emulated") / "libcuda_on_cpu.so"
    sources = sorted((ROOT / "kernels/csrc/cuda").glob("*.cu"))
    flags = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off")
    command = ("g++", *flags, "-w", "-I", str(EMULATION), "-x", "c++", *map(str, sources), "-o", str(path))
    subprocess.run(command, check=True, timeout=300)
    return path


@pytest.fixture(params=[*ISAS, pytest.param("cuda on cpu", marks=pytest.mark.processes)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[native.Library]:
    """Every compiled way to compute for CPU tensors, put in the place of the one that would be chosen."""
    path: Path = request.getfixturevalue("cpu_library")
    if request.param == "cuda on cpu":
        library = native.Library(request.getfixturevalue("emulated_library"))
    else:
        try:
            library = native.Library(path, ISAS[request.param])
        except native.KernelError as error:
            pytest.skip(f"this processor: {error}")
    monkeypatch.setattr(native, "library", lambda device: library)
    yield library
    native.Library(path)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library: the twins compute."""
    monkeypatch.setattr(native, "library", lambda device: None)


@pytest.fixture(params=[1, 2, 5], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
