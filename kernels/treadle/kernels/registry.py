"""Registration of operators with torch, in the namespace `torch.ops.treadle`.

The plain `torch.library.Library` is used, not `custom_op`: it costs 4 µs per call instead of 25, and no import of
sympy in every process, which takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_LIBRARY = torch.library.Library("treadle", "DEF")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def op(schema: str, *, fake: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Registers the decorated function for CPU and CUDA tensors, and `fake` for tensors without data.

    Example: `@op("digest(Tensor bits, int k1) -> Tensor", fake=lambda bits, k1: bits.new_empty(2))`.
    """

    def register(function: _Function) -> _Function:
        name = schema[: schema.index("(")]
        _LIBRARY.define(schema)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"treadle::{name}", fake, lib=_LIBRARY)
        return function

    return register


def writes_only(*_: Any) -> None:
    """The fake of operators that return nothing and write into their arguments."""
