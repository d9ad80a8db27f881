"""The proof of the kernels, as far as it goes without a GPU: the same checks on the CPU library, table and JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.benchmarks.gpu_proof import works
from tests.benchmarks.gpu_proof.__main__ import CASES, COLUMNS, Proof, main, proved, said
from tests.benchmarks.gpu_proof.overlap import Overlap
from tests.benchmarks.gpu_proof.proof import Case, Ceilings, damage, judged

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TOP = Ceilings(copy_gb_per_s=10.0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_kernel_is_its_twin_and_both_controls_are_caught(case: Case) -> None:
    found = judged(case, CPU, sizes=(2_049, 20_001), seed=3)
    assert found.equal
    assert found.caught


def wrong(n: int, seed: int, device: torch.device) -> works.Work:
    """A sum whose last element is one bit off."""
    work = works.reduce(n, seed, device)

    def run() -> None:
        work.run()
        work.outputs()[0].view(torch.int16)[-1] ^= 1

    return replace(work, run=run)


def idle(n: int, seed: int, device: torch.device) -> works.Work:
    """A kernel that does nothing where its outputs were right before."""
    work = works.reduce(n, seed, device)
    return replace(work, reset=work.run, run=lambda: None)


def deaf(n: int, seed: int, device: torch.device) -> works.Work:
    """A twin that does not look at its inputs."""
    work = works.reduce(n, seed, device)
    answer = work.twin(work.inputs)
    return replace(work, twin=lambda given: answer)


def test_a_wrong_kernel_and_a_check_that_cannot_fail_are_found_out() -> None:
    assert not judged(Case(name="wrong", prepare=wrong), CPU, sizes=(1_001,), seed=1).equal
    assert not judged(Case(name="idle", prepare=idle), CPU, sizes=(1_001,), seed=1).caught
    assert not judged(Case(name="deaf", prepare=deaf), CPU, sizes=(1_001,), seed=1).caught


def test_a_damaged_element_has_another_sign() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.tensor([1.5, 2.0]).to(dtype)
        damage(tensor)
        assert tensor.tolist() == [-1.5, 2.0]


def test_goals_are_a_gpus_and_are_told_apart() -> None:
    found = proved(Case(name="reduce", prepare=works.reduce, goal=0.85), CPU, TOP, quick=True)
    assert found.met is None
    assert found.cells()["met"] == "-"
    assert found.share == pytest.approx(found.gb_per_s / TOP.copy_gb_per_s, rel=0.01)
    row = Proof(kernel="k", equal=True, caught=True, ms=1, gb_per_s=9, share=0.9, goal=0.85, met=True)
    assert row.cells()["met"] == "met"
    assert replace(row, met=False).cells()["met"] == "not met"
    assert replace(row, equal=False).cells()["bits equal"] == "NO"


def test_the_proof_of_the_cpu_library_prints_a_table_and_writes_all_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cpu_library_is_built: None
) -> None:
    out = tmp_path / "proof.json"
    assert main(["--device", "cpu", "--quick", "--out", str(out)]) == 0
    told, held = capsys.readouterr().out, json.loads(out.read_text())
    assert [row["kernel"] for row in held["kernels"]] == [case.name for case in CASES]
    assert all(row["equal"] and row["caught"] and row["ms"] > 0 for row in held["kernels"])
    assert held["device"] == "cpu"
    assert held["driver"] == "none"
    assert held["ceilings"]["copy_gb_per_s"] > 0
    assert held["overlap"] == []
    for text in (*COLUMNS, *(case.name for case in CASES), str(out)):
        assert text in told


@pytest.fixture
def cpu_library_is_built() -> None:
    from treadle.kernels import native

    if native.library(CPU) is None:
        pytest.skip("needs the CPU library")


@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(tmp_path: Path) -> None:
    """In a process that imports torch and the kernels, and nothing of Ray, DeepSpeed or vLLM."""
    code = (
        "import sys; from tests.benchmarks.gpu_proof.__main__ import main; status = main([]); "
        "assert not {'ray', 'deepspeed', 'vllm', 'transformers', 'numpy.testing'} & set(sys.modules), 'too much'; "
        "sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.count("\n") == 1
    assert "torch finds no GPU here" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_overlap_is_the_hidden_share_of_the_shorter_side() -> None:
    given = Overlap(name="x", compute_ms=10, copies_ms=20, together_ms=20.5, in_turns_ms=30)
    assert given.share == pytest.approx(0.95)
    assert given.controlled
    assert "0.950 (goal 0.95, met)" in given.line(0.95)
    fooled = replace(given, in_turns_ms=22)
    assert not fooled.controlled
    assert "IT MUST BE ABOUT 0" in fooled.line(0.95)


def test_an_overlap_with_wrong_results_counts_for_nothing() -> None:
    given = Overlap(
        name="x",
        compute_ms=10,
        copies_ms=20,
        together_ms=20,
        in_turns_ms=30,
        rival_ms=25,
        right=False,
    )
    assert not given.controlled
    assert "BUT RESULTS ARE WRONG" in given.line(0.95)
    assert "then torch's product 25.00 ms" in given.line(0.95)


def test_a_driver_that_cannot_be_asked_is_unknown() -> None:
    assert said("no-such-program-here") == "unknown"
    assert said(sys.executable, "-c", "print('580.95'); print('more')") == "580.95"
