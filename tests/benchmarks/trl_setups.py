"""Configurations of TRL's `GRPOTrainer` on two CPU cores, among which the fastest is looked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlSetup:
    """What can be chosen without changing what is trained."""

    processes: int = 1
    """Data-parallel ranks (torchrun, gloo)."""
    threads: int = 2
    """Torch threads per process."""
    microbatches: int = 1
    """Gradient accumulation; generation always takes the whole batch at once."""
    continuous_batching: bool = False
    """transformers' continuous batching instead of `generate`."""
    attention: str = "sdpa"
    cache: str = ""
    """`cache_implementation` of `generate`; empty is transformers' own choice."""

    def described(self) -> str:
        drawn = (
            "continuous batching"
            if self.continuous_batching
            else f"generate ({self.cache or 'dynamic'} cache)"
        )
        return (
            f"TRL GRPOTrainer, {self.processes} process(es) x {self.threads} thread(s), {drawn}, {self.attention} "
            f"attention, {self.microbatches} micro-batch(es), fp32, fused AdamW, no gradient checkpointing, beta 0"
        )


SETUPS = {
    "threads": TrlSetup(),
    "one-thread": TrlSetup(threads=1),
    "ranks": TrlSetup(processes=2, threads=1),
    "micro": TrlSetup(microbatches=4),
    "ranks-micro": TrlSetup(processes=2, threads=1, microbatches=4),
    "static": TrlSetup(cache="static"),
    "continuous": TrlSetup(continuous_batching=True, attention="paged|sdpa"),
}

SHORTLIST = ("ranks", "threads")
"""What is tried before comparing, unless told otherwise: the two ways to use two cores."""
