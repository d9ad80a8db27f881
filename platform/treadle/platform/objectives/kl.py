"""Estimators of KL(π || π_ref) from one sampled token (Schulman, "Approximating KL divergence", 2020).

With r = π_ref / π: k1 = -log r (unbiased, may be negative), k2 = (log r)² / 2 (biased, low variance),
k3 = r - log r - 1 (unbiased, never negative).

As a term of the loss their *gradients* matter, and differ: that of k1 is ∇log π, whose expectation is zero,
so on its own it regularises nothing; that of k2 is log(π/π_ref) ∇log π, the gradient of the KL on-policy;
that of k3 is (1 - r) ∇log π, equal to it to first order. `kl_unbiased` multiplies the estimator with the
importance ratio (DeepSeek-V3.2), which makes the gradient of k1 and k3 that of the KL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch


def k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs - ref_logprobs


def k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    log_r = ref_logprobs - logprobs
    return torch.expm1(log_r) - log_r  # r - 1 without cancellation where the policies are close


KL_ESTIMATORS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
}
