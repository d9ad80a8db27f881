"""The chunked log-probability head equals its eager twin, exactly differentiates, and stays small."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.kernels.linear_logprob import linear_logprob, linear_logprob_eager


def _inputs(
    n: int, d: int, v: int, *, dtype: torch.dtype = torch.float64, seed: int = 0, bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    offset = torch.randn(v, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, weight, torch.randint(v, (n,), generator=g), offset


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_gradcheck_passes_for_log_probability_and_entropy(bias: bool, rows: int) -> None:
    hidden, weight, targets, offset = _inputs(7, 4, 5, bias=bias)

    def both(h: torch.Tensor, w: torch.Tensor, *b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_logprob(
            h,
            w,
            targets,
            bias=b[0] if b else None,
            temperature=0.7,
            chunk_elements=rows * 5,
            entropy_gradient=True,
        )

    leaves = (hidden, weight) if offset is None else (hidden, weight, offset)
    assert torch.autograd.gradcheck(both, leaves)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 33),
    v=st.integers(2, 50),
    rows=st.integers(1, 40),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    seed=st.integers(0, 2**16),
)
def test_chunks_give_what_full_logits_give(n: int, v: int, rows: int, temperature: float, seed: int) -> None:
    hidden, weight, targets, bias = _inputs(n, 8, v, seed=seed, bias=True)
    upstream = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    results = []
    for chunked in (True, False):
        if chunked:
            logprobs, entropy = linear_logprob(
                hidden, weight, targets, bias=bias, temperature=temperature, chunk_elements=rows * v
            )
        else:
            logprobs, entropy = linear_logprob_eager(
                hidden, weight, targets, bias=bias, temperature=temperature
            )
        grads = torch.autograd.grad((logprobs * upstream).sum(), [hidden, weight, bias])
        results.append([logprobs, entropy, *grads])
    for ours, twin in zip(*results, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-10, atol=1e-10)


def test_bf16_inputs_are_summed_in_fp32() -> None:
    hidden, weight, targets, _ = _inputs(64, 32, 1000, dtype=torch.bfloat16)
    logprobs, entropy = linear_logprob(hidden, weight, targets, chunk_elements=7000)
    exact, exact_entropy = linear_logprob_eager(hidden.double(), weight.double(), targets)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-4, atol=1e-4)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    exact_grad = torch.autograd.grad(exact.sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, exact_grad, rtol=2e-2, atol=2e-2)


def test_entropy_carries_no_gradient_unless_asked_for() -> None:
    hidden, weight, targets, _ = _inputs(5, 4, 6)
    assert not linear_logprob(hidden, weight, targets)[1].requires_grad
    assert linear_logprob(hidden, weight, targets, entropy_gradient=True)[1].requires_grad


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.full((2, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    logprobs, entropy = linear_logprob(hidden, weight, torch.tensor([0, 1]))
    logprobs.sum().backward()
    assert logprobs.tolist() == [0.0, -20000.0]
    assert torch.isfinite(entropy).all()
    assert torch.isfinite(weight.grad).all()  # type: ignore[arg-type]


def test_mismatched_shapes_and_a_zero_temperature_are_refused() -> None:
    hidden, weight, targets, _ = _inputs(5, 4, 6)
    with pytest.raises(ValueError, match="need \\[N, D\\]"):
        linear_logprob(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match="temperature=0"):
        linear_logprob(hidden, weight, targets, temperature=0.0)


_MEASURE = """
    import json, sys, torch
    from treadle.kernels.linear_logprob import linear_logprob, linear_logprob_eager
    torch.set_num_threads(1)
    n, d, v = int(sys.argv[2]), 8, 152_000
    function = linear_logprob if sys.argv[1] == "chunked" else linear_logprob_eager
    hidden = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=True)
    targets = torch.randint(v, (n,))
    warm, _ = function(hidden[:1], weight, targets[:1])
    warm.sum().backward()
    status = lambda key: int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from what is resident now
    before = status("VmRSS")
    logprobs, entropy = function(hidden, weight, targets)
    logprobs.sum().backward()
    print(json.dumps({"grown_bytes": status("VmHWM") - before, "logits_bytes": n * v * 4}))
"""


def _grown(which: str, tokens: int) -> float:
    """Growth of the process's peak memory over a forward and backward pass, in units of the full logits."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MEASURE), which, str(tokens)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    figures = json.loads(done.stdout)
    return float(figures["grown_bytes"] / figures["logits_bytes"])


@pytest.mark.processes
def test_peak_memory_for_a_vocabulary_of_152k_is_a_tenth_of_the_full_logits() -> None:
    # The chunk has a fixed size: 70 to 130 MB with what malloc keeps between blocks, whatever the tokens.
    assert _grown("chunked", 4096) < 0.1


@pytest.mark.processes
def test_the_twin_needs_the_full_logits_so_the_measurement_can_fail() -> None:
    assert _grown("eager", 128) > 1.0
