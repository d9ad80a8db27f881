"""Values that pass through a process which has no use for them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Packed:
    """A value as its pickled bytes: whoever passes it on neither builds nor takes apart its objects.

    Example: `Packed.of(group).open()` equals `group`. Like every message between Ray processes it must come
    from the run itself: opening it runs what it says.
    """

    data: bytes

    @classmethod
    def of(cls, value: object) -> Packed:
        """Raises what `pickle.dumps` raises for a value that cannot be pickled."""
        return cls(pickle.dumps(value, protocol=5))

    def open(self) -> Any:
        """The value, made anew at every call."""
        return pickle.loads(self.data)  # noqa: S301  from the run's own actors


def unpacked(value: Any) -> Any:
    """What is packed, or the value itself."""
    return value.open() if isinstance(value, Packed) else value
