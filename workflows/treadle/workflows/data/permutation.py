"""A shuffled order without shuffling: position → index, computed for each position on its own."""

from __future__ import annotations

from treadle.platform.seeds import derive_seed

_ROUNDS = 4
_WORD = (1 << 64) - 1


class Permutation:
    """A pseudo-random bijection of 0 … size-1, chosen by `key`.

    A Feistel network permutes the smallest power of two that holds the size; positions that fall outside walk
    on until they are inside (at most two steps on average), which keeps it a bijection.

    Example: `[Permutation(5, "seed", 7).at(i) for i in range(5)]` is an order of 0 … 4.
    """

    def __init__(self, size: int, *key: str | int) -> None:
        if size < 1:
            raise ValueError(f"Permutation: size {size} must be at least 1")
        bits = max(2, (size - 1).bit_length())
        self._size = size
        self._left, self._right = bits - bits // 2, bits // 2
        self._keys = [derive_seed("permutation", *key, r) & _WORD for r in range(_ROUNDS)]

    def at(self, position: int) -> int:
        """The index at a position in [0, size)."""
        if not 0 <= position < self._size:
            raise IndexError(f"position {position} is not in [0, {self._size})")
        found = self._network(position)
        while found >= self._size:
            found = self._network(found)
        return found

    def _network(self, value: int) -> int:
        a_bits, b_bits = self._left, self._right
        a, b = value >> b_bits, value & ((1 << b_bits) - 1)
        for key in self._keys:
            a, b = b, a ^ (_mixed(b, key) & ((1 << a_bits) - 1))
            a_bits, b_bits = b_bits, a_bits
        return (a << b_bits) | b


def _mixed(value: int, key: int) -> int:
    """64 well-stirred bits (the finaliser of SplitMix64)."""
    z = ((value ^ key) + 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


class Epochs:
    """An endless order of `size` things: every epoch visits each once, in an order of its own.

    consumes: nothing; a position's epoch is position // size, and the order follows from (key, epoch).
    """

    def __init__(self, size: int, *key: str | int) -> None:
        self._size, self._key = size, key
        self._epoch = -1
        self._order: Permutation | None = None

    def at(self, position: int) -> int:
        """The index at any position from 0 on."""
        if position < 0:
            raise IndexError(f"position {position} is negative")
        epoch, place = divmod(position, self._size)
        if self._order is None or epoch != self._epoch:
            self._epoch, self._order = epoch, Permutation(self._size, *self._key, epoch)
        return self._order.at(place)
