"""Who sends to whom: rotated chains over nodes, fan-out inside a node, slow links last.

A version's chunks are dealt to `rotations` groups, and each group travels along its own chain: the source, then the
nodes one after the other, every chain beginning with another node. Each node receives everything once and sends on at
most as much, whatever their number: everybody is served in about the time of one transfer, plus the time a chunk takes
from end to end. Of several members on one node, the first is in the chains and the others are served by it. A member
whose link is slow, or that was reported lost, is behind everybody and sends to nobody.

Members are addresses; an address's host is its node. Plain data, no sockets.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from treadle.actors.broadcast.chain_wire import Address

SLOW = 0.4
"""A member is slow when its fastest link has less than this share of the median member's."""


@dataclass(slots=True, kw_only=True)
class Member:
    """A receiver. `measured` is the speed of its fastest link, in bytes per second, 0 while unknown; `remembered` that
    of an earlier version."""

    address: Address
    remembered: float = 0.0
    measured: float = 0.0
    gone: bool = False
    avoided: bool = False  # its children lost it
    done: bool = False

    @property
    def rate(self) -> float:
        return self.measured or self.remembered


@dataclass(slots=True, kw_only=True)
class Plan:
    """The members of one version in the order they came, and the parents that follow from what is known of them.

    Example: with source s, nodes a, b, c and two rotations, the chains are s→a→b→c and s→b→c→a.
    """

    source: Address
    rotations: int
    members: dict[Address, Member] = field(default_factory=dict)

    def join(self, address: Address, remembered: float = 0.0) -> None:
        self.members[address] = Member(address=address, remembered=remembered)

    def slow(self) -> frozenset[Address]:
        """Members far slower than the rest; with fewer than three known speeds nobody is."""
        known = [member.rate for member in self._living() if member.rate]
        if len(known) < 3:
            return frozenset()
        limit = SLOW * statistics.median(known)
        return frozenset(member.address for member in self._living() if 0 < member.rate < limit)

    def parents(self) -> dict[Address, tuple[Address, ...]]:
        """For every living member the parent of each group."""
        slow = self.slow()
        last = [
            m.address for m in sorted(self._living(), key=lambda m: -m.rate) if m.avoided or m.address in slow
        ]
        nodes: dict[str, list[Address]] = {}
        for member in self._living():
            if member.address not in last:
                nodes.setdefault(member.address[0], []).append(member.address)
        heads = [members[0] for host, members in nodes.items() if host != self.source[0]]
        chains = [_rotated(heads, group, self.rotations) for group in range(self.rotations)]
        found: dict[Address, list[Address]] = {}
        for chain in chains:
            before = self.source
            for head in chain:
                found.setdefault(head, []).append(before)
                before = head
        for host, members in nodes.items():
            near = self.source if host == self.source[0] else members[0]
            for other in members if near == self.source else members[1:]:
                found[other] = [near] * self.rotations
        for place, address in enumerate(last):
            found[address] = [_tail(chain, place, self.source) for chain in chains]
        return {address: tuple(given) for address, given in found.items()}

    def told(self, child: Address, rates: Mapping[Address, float]) -> None:
        """Takes over the link speeds that a child measured: each is a lower bound for both of its ends."""
        for parent, rate in rates.items():
            for end in (child, parent):
                if end in self.members:
                    self.members[end].measured = max(self.members[end].measured, rate)

    @property
    def finished(self) -> bool:
        """Nobody waits for chunks any more."""
        return all(member.done for member in self._living())

    def _living(self) -> Iterator[Member]:
        return (member for member in self.members.values() if not member.gone)


def _rotated(heads: Sequence[Address], group: int, rotations: int) -> list[Address]:
    first = group * len(heads) // rotations
    return [*heads[first:], *heads[:first]]


def _tail(chain: Sequence[Address], place: int, source: Address) -> Address:
    """The parent of the one that is behind everybody: the last of the chain, who has no other child, then the one
    before."""
    return chain[-1 - place % len(chain)] if chain else source
