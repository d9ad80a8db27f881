"""Every kernel on a GPU, in one command that needs torch, numpy and the compilers, and no Ray, DeepSpeed or vLLM.

    PYTHONPATH=kernels python -m tests.benchmarks.gpu_proof [--device cpu] [--quick] [--out gpu-proof.json]

Builds the libraries, measures the ceilings, checks every kernel bit for bit against its twin with controls that must
fail, times it, and prints a table. Exits with 0 when all are equal and all controls were caught (whether goals are met
is a column), with 1 when not, with 2 where there is no GPU. `--device cpu` proves the CPU library in the same way;
goals are a GPU's.
"""

from __future__ import annotations

import argparse
import json
import platform
import runpy
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from tests.benchmarks.bench_rows import table
from tests.benchmarks.gpu_proof import works
from tests.benchmarks.gpu_proof.overlap import Overlap, overlap_of_pack, overlap_of_product
from tests.benchmarks.gpu_proof.proof import Case, Ceilings, ceilings, judged, timed_ms

from treadle.kernels import native

CASES = (
    Case(name="digest", prepare=works.digest, goal=0.85),
    Case(name="cast_diff", prepare=works.cast_diff, goal=0.85),
    Case(name="pack, copy", prepare=works.pack("copy", torch.bfloat16), goal=0.85),
    Case(name="pack, fp32 to bf16", prepare=works.pack("bf16", torch.float32), goal=0.85),
    Case(name="pack, bf16 to fp8", prepare=works.pack("fp8", torch.bfloat16), goal=0.85),
    Case(name="pack, bf16 to fp8, powers of two", prepare=works.pack("fp8_pow2", torch.bfloat16)),
    Case(name="unpack, fp8 to bf16", prepare=works.unpack),
    Case(name="delta_encode", prepare=works.delta_encode),
    Case(name="delta_apply", prepare=works.delta_apply, goal=0.5),
    Case(name="reduce, 4 x bf16", prepare=works.reduce),
    Case(name="moe, there and back", prepare=works.moe),
    Case(name="streamed_mm, all rows there", prepare=works.streamed_mm),
)
OVERLAP_GOAL = 0.95
SEED = 20_261_123
COLUMNS = ("kernel", "bits equal", "controls caught", "ms", "GB/s", "of ceiling", "goal", "met")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """One kernel's row. `share` is of the copy ceiling; for delta_apply that is the floor of its sectors."""

    kernel: str
    equal: bool
    caught: bool
    ms: float
    gb_per_s: float
    share: float
    goal: float
    met: bool | None
    """None where there is no goal."""

    def cells(self) -> dict[str, object]:
        known = self.met is not None
        return {
            "kernel": self.kernel,
            "bits equal": "yes" if self.equal else "NO",
            "controls caught": "yes" if self.caught else "NO",
            "ms": self.ms,
            "GB/s": self.gb_per_s,
            "of ceiling": self.share,
            "goal": f"{self.goal:g}" if known else "-",
            "met": {True: "met", False: "not met", None: "-"}[self.met],
        }


def proved(case: Case, device: torch.device, top: Ceilings, *, quick: bool) -> Proof:
    sizes = (3_001, 70_001) if quick else (3_001, 70_001, 1_000_003)
    found = judged(case, device, sizes=sizes, seed=SEED)
    n, rounds = (200_000, 3) if quick else (100_000_000, 50) if device.type == "cuda" else (2_000_000, 9)
    work = case.prepare(n, SEED, device)
    ms = timed_ms(work, device, rounds=rounds)
    rate = work.moved_bytes / ms / 1e6
    wanted = case.goal > 0 and device.type == "cuda"
    return Proof(
        kernel=case.name,
        equal=found.equal,
        caught=found.caught,
        ms=round(ms, 4),
        gb_per_s=round(rate, 1),
        share=round(rate / top.copy_gb_per_s, 3),
        goal=case.goal,
        met=rate / top.copy_gb_per_s >= case.goal if wanted else None,
    )


def setting(device: torch.device) -> dict[str, str]:
    """When and where: date, hardware, driver and versions."""
    hardware, driver = platform.machine(), "none"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "device": device.type,
        "hardware": hardware,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
    }


def said(*command: str) -> str:
    """The first line that a command prints; "unknown" where it cannot be asked."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]


def overlaps(device: torch.device, *, quick: bool) -> list[Overlap]:
    """Of pack with copies to the host, and of the product with copies from there; none without a GPU."""
    if device.type != "cuda":
        return []
    side = 1024 if quick else 8192
    return [overlap_of_pack(device, 1 << 24 if quick else 1 << 28), overlap_of_product(device, side)]


def written(
    out: Path, where: dict[str, str], top: Ceilings, proofs: list[Proof], hidden: list[Overlap]
) -> None:
    rows = [asdict(proof) for proof in proofs]
    whole = {**where, "ceilings": asdict(top), "kernels": rows, "overlap": [asdict(o) for o in hidden]}
    out.write_text(json.dumps(whole, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small data: whether it works, not how fast")
    parser.add_argument("--out", type=Path, default=Path("gpu-proof.json"))
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu-proof: torch finds no GPU here; run it where torch.cuda.is_available() is true, or --device cpu."
        )
        return 2
    runpy.run_path(str(Path(__file__).parents[3] / "kernels" / "build.py"))["main"]()
    device = torch.device(given.device)
    if native.library(device) is None:
        print(f"gpu-proof: no library computes on {device}: see above what is missing, and {native.SETTING}.")
        return 1
    where = setting(device)
    top = ceilings(device, size_bytes=1 << 24 if given.quick else 1 << 30, rounds=3 if given.quick else 30)
    print(f"{where}\n{top}", flush=True)
    proofs = [proved(case, device, top, quick=given.quick) for case in CASES]
    hidden = overlaps(device, quick=given.quick)
    written(given.out, where, top, proofs, hidden)
    print(table([proof.cells() for proof in proofs], COLUMNS))
    for overlap in hidden:
        print(overlap.line(OVERLAP_GOAL))
    print(f"written to {given.out}")
    well = all(proof.equal and proof.caught for proof in proofs) and all(o.controlled for o in hidden)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
