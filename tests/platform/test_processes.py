"""What a process says to Linux about itself, and to its C library."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes

PROGRAM = """
import resource, sys, threading
import torch
from treadle.platform.processes import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
torch.set_num_threads(1)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def rounds():
    for count in (1, 2, 3):  # never the same sizes again
        before = faults()
        held = [torch.ones(size * 100_000 + count * 1_000) for size in range(1, 60)]
        del held
    print(faults() - before)

thread = threading.Thread(target=rounds)
thread.start()
thread.join()
"""


def faults_of_the_third_round(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True, timeout=120
    )
    return int(done.stdout)


def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    assert faults_of_the_third_round("kept") < faults_of_the_third_round("given back") / 2
