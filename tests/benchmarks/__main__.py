"""All benchmarks, one after the other in one process group; one table, and the rows in bench.json.

python -m tests.benchmarks [--quick] [--out bench.json]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.bench_rows import hardware, read_rows, table

BENCHES = (
    "bench_engine",
    "bench_kernels",
    "bench_linear",
    "bench_mail",
    "bench_outage",
    "bench_overlap",
    "bench_programs",
    "bench_step",
    "bench_supervision",
    "bench_verify",
    "bench_weights",
)


def arguments_of(bench: str, out: Path, *, quick: bool) -> list[str]:
    """A benchmark's command line; `bench_engine` counts rounds instead of steps."""
    less = [] if not quick else ["--rounds", "1"] if bench == "bench_engine" else ["--quick"]
    return ["-m", f"tests.benchmarks.{bench}", "--out", str(out), *less]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps: the figures are rough")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    given = parser.parse_args()
    given.out.unlink(missing_ok=True)
    failed = []
    for bench in BENCHES:
        print(f"\n== {bench}", flush=True)
        if subprocess.run([sys.executable, *arguments_of(bench, given.out, quick=given.quick)]).returncode:
            failed.append(bench)
    print(f"\n{hardware()}\n{table(read_rows(given.out))}\nwritten to {given.out}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
