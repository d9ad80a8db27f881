"""Importing a large library without the optional ones it would pull in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Within the block these modules look as if they were not installed, unless they are loaded already.

    DeepSpeed's autotuner imports mlflow, transformers' assisted decoding scikit-learn, its losses for images scipy
    and accelerate: more than half of a rank's start for nothing a rank uses.
    """
    absent: dict[str, ModuleType | None] = dict.fromkeys(n for n in names if n not in sys.modules)
    sys.modules.update(absent)  # type: ignore[arg-type]  # None is the import system's word for "absent"
    try:
        yield
    finally:
        for name in absent:
            if sys.modules.get(name, sys) is None:
                del sys.modules[name]


def import_transformers() -> Any:
    """transformers with what every causal language model of it needs, and nothing of what trainers and assisted
    decoding would bring."""
    with without("sklearn", "pandas", "scipy", "accelerate"):
        import transformers

        # Names of transformers are loaded on use, which would be after this block.
        for name in ("AttentionInterface", "AutoModelForCausalLM", "Qwen2ForCausalLM"):
            getattr(transformers, name)
    return transformers
