"""What the kernels raise.

KernelError            a library is missing although it is asked for, or a call into it failed
├── DeltaCorrupt       a delta is damaged: fetch it again
└── DeltaMismatch      a delta is whole, but made for other weights than those it met: publish all weights
"""

from __future__ import annotations


class KernelError(RuntimeError):
    """The message names the remedy."""


class DeltaCorrupt(KernelError):  # noqa: N818  a state of the data, as in zlib's and the standard library's names
    """The delta is not one that an encoder writes, or belongs to another layout. Nothing was written."""


class DeltaMismatch(KernelError):  # noqa: N818
    """Applying the delta would not give the weights it was made to give. Nothing was written."""
