"""Builds the kernel libraries into `kernels/treadle/kernels`, ahead of time: nothing is compiled at run time.

    python kernels/build.py [--force]

libtreadle_kernels_cpu.so needs a C++17 compiler (`CXX`, g++), libtreadle_kernels_cuda.so needs nvcc 12.8 or newer
(`NVCC`, the PATH, or `CUDA_HOME`). What has no compiler is left out, and said so: the package then works with its
eager twins. A library whose sources, flags and compiler are unchanged is kept. `TREADLE_BUILD=skip` builds nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc"
PACKAGE = HERE / "treadle" / "kernels"
CPU_LIBRARY = "libtreadle_kernels_cpu.so"
CUDA_LIBRARY = "libtreadle_kernels_cuda.so"

CXX_FLAGS = (
    *(
        "-std=c++17",
        "-O3",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-exceptions",
        "-fno-rtti",
        "-Wall",
        "-Wextra",
    ),
    "-fno-math-errno",  # a square root is an instruction, not a call into libm
    "-ffp-contract=off",  # a fused multiply-add on one side only would break equality with the GPU
)
AVX2 = ("-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt")
AVX512 = (*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mprefer-vector-width=512")
ISA_FLAGS = {
    "scalar": (),
    "avx2": AVX2,
    "avx512": AVX512,
    "vbmi2": (*AVX512, "-mavx512vbmi2"),  # Ice Lake, Zen 4 and what came after them
}
NVCC_FLAGS = (
    *("-std=c++17", "-O3", "-fmad=false"),
    # Guards of static variables are all that would need the C++ library.
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-threadsafe-statics",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_100,code=sm_100",
    "-gencode=arch=compute_90,code=compute_90",  # PTX for what comes later: sm_90a code is not forward compatible
    *("-Xptxas=-v,-warn-spills,-warn-lmem-usage", "--compress-mode=size"),
)
LINK_FLAGS = ("-Wl,--no-undefined,--exclude-libs,ALL,-s",)


def main(force: bool = False, log: Callable[[str], None] = print) -> list[Path]:
    """Builds what can be built and returns the libraries. Raises `RuntimeError` with the compiler's words when
    a source does not compile."""
    if os.environ.get("TREADLE_BUILD") == "skip":
        log("kernels: TREADLE_BUILD=skip, nothing is built")
        return []
    built = [build_cpu(PACKAGE, force, log), build_cuda(PACKAGE, force, log)]
    libraries = [library for library in built if library]
    for library in libraries:
        log(f"kernels: {library}")
    return libraries


def build_cpu(
    folder: Path, force: bool, log: Callable[[str], None], extra: tuple[str, ...] = ()
) -> Path | None:
    """The CPU library in `folder`, or None where there is no C++ compiler. `extra` flags go to every command."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not compiler:
        log("kernels: no C++ compiler (set CXX or install g++): the CPU library is left out")
        return None
    flags = (compiler, *CXX_FLAGS, *extra)
    if not all(_accepts(compiler, isa) for isa in ISA_FLAGS.values()):
        log(f"kernels: {compiler} cannot compile for x86-64: the CPU library is left out")
        return None
    sources = sorted((SOURCES / "cpu").glob("*.cpp"))
    units = [(source, ()) for source in sources if source.stem != "loops"]
    units += [
        (SOURCES / "cpu" / "loops.cpp", (f"-DTREADLE_LOOPS=loops_{isa}", *isa_flags))
        for isa, isa_flags in ISA_FLAGS.items()
    ]
    link = (compiler, "-shared", "-static-libgcc", *LINK_FLAGS, *extra)
    return _build(folder / CPU_LIBRARY, flags, units, link, force, log)


def build_cuda(
    folder: Path,
    force: bool,
    log: Callable[[str], None],
    details: Callable[[str], None] | None = None,
) -> Path | None:
    """The CUDA library in `folder`, or None where there is no nvcc. `details` gets ptxas's account of registers,
    stack and spills."""
    compiler = find_nvcc()
    if not compiler:
        log("kernels: no nvcc (set NVCC or CUDA_HOME): the CUDA library is left out")
        return None
    units = [(source, ()) for source in sorted((SOURCES / "cuda").glob("*.cu"))]
    linker = ("-Xlinker", "--as-needed", "-Xlinker", LINK_FLAGS[0].removeprefix("-Wl,"))
    link = (compiler, "-shared", "-cudart=static", *linker)
    return _build(folder / CUDA_LIBRARY, (compiler, *NVCC_FLAGS), units, link, force, log, details)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which(str(Path(home) / "bin" / "nvcc"))


def _accepts(compiler: str, flags: Iterable[str]) -> bool:
    command = (compiler, *flags, "-x", "c++", "-fsyntax-only", "-")
    return subprocess.run(command, check=False, input="", text=True, capture_output=True).returncode == 0


def _build(
    library: Path,
    compile_: tuple[str, ...],
    units: list[tuple[Path, tuple[str, ...]]],
    link: tuple[str, ...],
    force: bool,
    log: Callable[[str], None],
    details: Callable[[str], None] | None = None,
) -> Path:
    """Compiles `units` (source, flags of its own) side by side and links them; atomic, so that a process which
    has the old library loaded keeps it. `details` gets what the compiler says."""
    build_id = _build_id(compile_, units, link)
    if not force and library.exists() and f"treadle-build:{build_id}".encode() in library.read_bytes():
        return library
    log(f"kernels: building {library.name} with {compile_[0]}")
    # Beside the package, not in it: whoever packs the package at this moment must not see unfinished files.
    beside = HERE if library.parent == PACKAGE else library.parent
    with tempfile.TemporaryDirectory(prefix=".treadle-build-", dir=beside) as folder:
        objects = [f"{folder}/{index}-{source.stem}.o" for index, (source, _) in enumerate(units)]
        commands = [
            (*compile_, *flags, f'-DTREADLE_BUILD="{build_id}"', "-c", str(source), "-o", target)
            for (source, flags), target in zip(units, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            said = "".join(pool.map(_run, commands))
        unfinished = Path(folder, library.name)
        _run((*link, *objects, "-o", str(unfinished)))
        unfinished.replace(library)
    if details:
        details(said)
    return library


def _build_id(
    compile_: tuple[str, ...], units: list[tuple[Path, tuple[str, ...]]], link: tuple[str, ...]
) -> str:
    total = hashlib.sha256(repr((compile_, units, link)).encode())
    total.update(_run((compile_[0], "--version")).encode())
    for path in sorted(SOURCES.rglob("*")):
        if path.is_file():
            total.update(f"{path.relative_to(SOURCES)}\0".encode() + path.read_bytes())
    return total.hexdigest()[:32]


def _run(command: tuple[str, ...]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"kernels: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    main(force="--force" in sys.argv)
