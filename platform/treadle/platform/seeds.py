"""Seeds that depend on what is drawn, never on who draws it or when."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def derive_seed(*parts: str | int) -> int:
    """A 128-bit integer from the parts, stable across processes and Python versions (BLAKE2b).

    Example: `derive_seed(run_seed, "addition-47+85", sample_index, version_step)`.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def uniforms(seed: int, n: int) -> NDArray[np.float64]:
    """n uniforms in [0, 1): the t-th is the one the t-th token of a sample is drawn with, also after the
    sample was interrupted and resumed by prefix."""
    return np.random.Generator(np.random.Philox(key=seed)).random(n)
