"""Lack of memory is recognised in all its forms, and told with what helps."""

from __future__ import annotations

import pytest
import torch

from treadle.platform.memory import PHRASE, REMEDIES, kernel_kills, ran_out, remedy

MORE_THAN_THERE_IS = 2**50


def test_what_python_and_torch_raise_without_memory_is_recognised() -> None:
    with pytest.raises(MemoryError) as of_python:
        bytearray(MORE_THAN_THERE_IS)
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)
    assert ran_out(of_python.value)
    assert ran_out(of_torch.value)
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory of words"), OSError()],
)
def test_other_failures_are_not_taken_for_it(error: Exception) -> None:
    assert not ran_out(error)


def test_only_a_cause_without_memory_is_given_its_remedy() -> None:
    assert remedy("rollout", f"its node {PHRASE}, and Ray ended its process", "else") == REMEDIES["rollout"]
    assert remedy("rollout", "its process 4711 was killed or crashed", "else") == "else"


def test_the_kernel_counts_what_it_ended() -> None:
    assert kernel_kills() >= 0
