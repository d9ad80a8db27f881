"""The libraries: what they export and need, how they are found, and how loudly they are missed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.weights import random_bits

import treadle.kernels.reduce  # noqa: F401  registers its operator
from treadle.kernels import native
from treadle.kernels.cast_diff import CastDiff
from treadle.kernels.delta import encode_delta
from treadle.kernels.digest import Partial
from treadle.kernels.errors import KernelError
from treadle.kernels.layout import Layout
from treadle.kernels.moe import route
from treadle.kernels.pack import Packing
from treadle.kernels.plan import Plan
from treadle.kernels.streamed_mm import ALL_CAME

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
EXPORTED = {
    "treadle_abi",
    "treadle_build",
    "treadle_cast_diff",
    "treadle_combine_rows",
    "treadle_delta_apply",
    "treadle_delta_check",
    "treadle_delta_encode",
    "treadle_delta_scratch",
    "treadle_digest",
    "treadle_digest_at",
    "treadle_digest_pieces",
    "treadle_pack",
    "treadle_ready",
    "treadle_reduce",
    "treadle_scatter_rows",
    "treadle_streamed_mm",
    "treadle_unpack",
}
CPU_ONLY = {"treadle_decode_attention", "treadle_panel_product", "treadle_rms_norm", "treadle_silu_gate"}
CPU_BYTES, CUDA_BYTES = 520_000, 1_500_000  # the CPU's loops are there four times


@pytest.fixture(scope="module")
def cuda_build(build: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The CUDA library for all targets, and what ptxas said about it."""
    if not build["find_nvcc"]():
        pytest.skip("needs nvcc")
    said: list[str] = []
    path = build["build_cuda"](tmp_path_factory.mktemp("cuda"), True, print, said.append)
    return path, "".join(said)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def _needed(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", _output("readelf", "-d", str(library))))


def _symbols(library: Path) -> set[str]:
    return {line.split()[-1] for line in _output("nm", "-D", "--defined-only", str(library)).splitlines()}


def _newest_glibc(library: Path) -> tuple[int, ...]:
    found = re.findall(r"GLIBC_(\d+)\.(\d+)", _output("readelf", "-V", str(library)))
    return max(tuple(map(int, version)) for version in found)


def _declared() -> set[str]:
    return set(re.findall(r"TREADLE_API [^(;]*?\b(treadle_\w+)\(", (ROOT / "kernels/csrc/abi.h").read_text()))


def test_the_cpu_library_exports_its_interface_and_needs_the_c_library_alone(cpu_library: Path) -> None:
    assert _symbols(cpu_library) == EXPORTED | CPU_ONLY == _declared()
    assert _needed(cpu_library) == {"libc.so.6"}
    assert _newest_glibc(cpu_library) <= (2, 34)
    assert cpu_library.stat().st_size < CPU_BYTES


def test_the_cuda_library_exports_the_same_and_brings_its_runtime(cuda_build: tuple[Path, str]) -> None:
    library, _ = cuda_build
    assert _symbols(library) == EXPORTED
    assert _needed(library) <= {"libc.so.6", "ld-linux-x86-64.so.2"}
    assert _newest_glibc(library) <= (2, 34)
    assert library.stat().st_size < CUDA_BYTES


def test_the_cuda_sources_compile_for_every_target_without_spills(cuda_build: tuple[Path, str]) -> None:
    _, said = cuda_build
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", said)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    names = {name for name, _ in kernels}
    assert {target for _, target in kernels} == {"sm_80", "sm_90a", "sm_100"}
    assert len(kernels) == 3 * len(names)
    assert len(names) >= 15
    spilled = [frame for frame in frames if frame[1:] != ("0", "0")]
    assert len(frames) >= len(kernels)
    assert spilled == []
    assert "Local memory used" not in said


def test_the_cuda_library_loads_without_a_gpu_and_says_what_is_missing(cuda_build: tuple[Path, str]) -> None:
    if torch.cuda.is_available():
        native.Library(cuda_build[0])
        return
    with pytest.raises(KernelError, match=r"cannot compute here: CUDA error \d+"):
        native.Library(cuda_build[0])


def test_an_unchanged_library_is_kept_and_changed_flags_build_it_again(
    build: dict[str, Any], tmp_path: Path
) -> None:
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" const char* small() { return "treadle-build:" TREADLE_BUILD; }\n')
    said: list[str] = []

    def built(*flags: str) -> int:
        command = ("g++", "-fPIC", *flags)
        library = build["_build"](
            tmp_path / "libsmall.so", command, [(source, ())], ("g++", "-shared"), False, said.append
        )
        return library.stat().st_mtime_ns

    first = built("-O1")
    assert built("-O1") == first
    assert len(said) == 1
    built("-O2")
    assert len(said) == 2
    source.write_text("this is no C++\n")
    with pytest.raises(RuntimeError, match=r"small\.cpp"):
        built("-O3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["libsmall.so", "small.cpp"]


def test_without_compilers_the_build_says_what_is_left_out(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, str(ROOT / "kernels/build.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert "the CPU library is left out" in done.stdout
    assert "the CUDA library is left out" in done.stdout


def test_without_a_library_the_twins_are_used_with_one_warning(tmp_path: Path) -> None:
    """In a process of its own: the choice is made once per process."""
    code = """
        import pathlib, sys, torch
        from treadle.kernels import native
        from treadle.kernels.digest import partial_digest, partial_digest_eager
        native.FOLDER = pathlib.Path(sys.argv[1])
        found = {partial_digest("w", 0, torch.arange(9.0)) for _ in range(3)}
        print(found == {partial_digest_eager("w", 0, torch.arange(9.0))}, native.library(torch.device("cpu")))
    """
    environment = {k: v for k, v in os.environ.items() if k != native.SETTING}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "True None\n"
    assert done.stderr.count("RuntimeWarning") == 1
    assert "python kernels/build.py" in done.stderr


@pytest.fixture
def undecided() -> Iterator[None]:
    """No library is chosen yet, nor afterwards."""
    native._library.cache_clear()
    yield
    native._library.cache_clear()


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("setting", "device", "computes"), [("cpu", CPU, True), ("cpu", CUDA, False), ("torch", CPU, False)]
)
def test_the_setting_forces_what_computes(
    undecided: None,
    cpu_library: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    device: torch.device,
    computes: bool,
) -> None:
    monkeypatch.setenv(native.SETTING, setting)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (native.library(device) is not None) == computes


@pytest.mark.parametrize("setting", ["cpu", "cuda"])
def test_a_library_that_is_asked_for_and_missing_is_an_error(
    undecided: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str
) -> None:
    monkeypatch.setenv(native.SETTING, setting)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    with pytest.raises(
        KernelError, match=r"libtreadle_kernels_cpu.so does not load .* python kernels/build.py"
    ):
        native.library(CPU)


def test_an_unknown_setting_is_an_error(undecided: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SETTING, "gpu")
    with pytest.raises(KernelError, match="TREADLE_KERNELS='gpu': set it to cuda, cpu or torch"):
        native.library(CPU)


def test_a_file_that_is_no_library_or_an_older_one_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"\x7fELF nothing")
    with pytest.raises(KernelError, match=r"libbroken.so does not load"):
        native.Library(broken)
    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    older = tmp_path / "libolder.so"
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(older)]
    subprocess.run(command, input='extern "C" int treadle_abi() { return 0; }', text=True, check=True)
    with pytest.raises(KernelError, match="has interface 0, not 2"):
        native.Library(older)


def test_a_status_is_told_in_words(cpu_library: Path) -> None:
    lanes = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(KernelError, match="treadle_digest: an argument is out of range"):
        native.Library(cpu_library).call("digest", lanes, 2, 3, 0, 0, 0, lanes, device=lanes.device)


def _arguments() -> dict[str, tuple[Any, ...]]:
    """Sample arguments of every operator."""
    old, new = random_bits(70_000, torch.bfloat16, 1), random_bits(70_000, torch.bfloat16, 2)
    layout = Layout.of([("w", old)])
    cast = CastDiff(layout, [torch.randn(70_000)], [old.clone()])
    delta = encode_delta(layout, [new], before=[old], base=Partial(0, 0), digest=Partial(0, 0))
    sizes = delta.blocks.long() & ((1 << 28) - 1)
    given = (layout.table, delta.blocks, sizes.cumsum(0) - sizes, delta.payload)
    given = (*given, *Plan.direct(layout, [("w", old)]).baked(), [old])
    two, verdict = torch.zeros(2, dtype=torch.int64), torch.tensor([2**63 - 1, 0])
    blocks, payload = torch.zeros(2, dtype=torch.int32), torch.zeros(140_000, dtype=torch.uint8)
    packing = Packing([old])
    bucket, scales, flags = packing.buffers(old.device)
    tiles = (packing.segments, [old], packing.tiles, packing.form, bucket, scales)
    routing = route(torch.randint(0, 4, (10, 2)), experts=4)
    rows, tokens = torch.zeros(routing.rows, 8), torch.zeros(10, 8)
    choices = (routing.row_of, routing.expert_of, routing.counts)
    left, right, product = torch.randn(6, 8), torch.randn(8, 4), torch.zeros(6, 4)
    return {
        "streamed_mm_": (left, right, torch.ones(2).int(), 1, 3, 10**6, product, torch.tensor([ALL_CAME])),
        "scatter_rows_": (tokens, *choices, 1, rows, torch.zeros(4, dtype=torch.int32)),
        "combine_rows_": (rows, routing.row_of, torch.ones(10, 2), tokens),
        "pack_": (*tiles, packing.expected, flags, packing.chunk_bytes, 1),
        "unpack_": tiles,
        "reduce_": ([old, new], torch.empty_like(old)),
        "digest": (old.view(torch.int16), 3, 5, -7),
        "digest_pieces": (layout.table, [old], layout.blocks),
        "digest_at": (old.view(torch.int16), torch.arange(70_000), 5, -7),
        "cast_diff_": (layout.table, cast.masters, cast.parameters, cast.dirty, two, torch.zeros(1).long()),
        "delta_encode": (layout.table, [new], [old], [], True, blocks, payload, two),
        "delta_check": (*given, two, verdict),
        "delta_apply_": (*given, two, None, verdict),
    }


@pytest.mark.parametrize("name", sorted(_arguments()))
def test_operators_keep_torchs_rules(cpu_library: Path, name: str) -> None:
    """Schemas tell the truth about what is written, fakes agree with the real thing, also under `torch.compile`."""
    operator: Callable[..., Any] = getattr(torch.ops.treadle, name).default
    torch.library.opcheck(operator, _arguments()[name])


def test_every_operator_is_checked() -> None:
    names = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("treadle::")
    }
    assert {name.split(".")[0] for name in names} == set(_arguments())
