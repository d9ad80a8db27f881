"""How many sequences each worker draws at once: `rollout.slots`, or less after it ran out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.worker import WorkerStatus
from treadle.cluster.backoff import BackOff, BackOffs, Lever

SETTING = "rollout.slots"
Lowered: TypeAlias = Callable[[BackOff], None]


class Slots:
    """Of the workers of a pool, by name: a replacement has those of its predecessor, or half.

    `lowered` hears of each that gets fewer.
    """

    def __init__(self, config: RolloutConfig, back_offs: BackOffs) -> None:
        self.lowered: Lowered = lambda _: None
        self._config = config
        self._back_offs = back_offs
        self._fewer: dict[str, int] = {}

    def of(self, name: str) -> int:
        return self._fewer.get(name, self._config.slots)

    def lower(self, name: str, known: Iterable[WorkerStatus]) -> str:
        """Half the slots for the worker's replacement. Returns why it keeps them, where it does. `known` is what the
        workers said last: where samples would change with the slots, they stay."""
        if any(status.slots_matter for status in known):
            return (
                f"{SETTING}={self.of(name)} stays in force for {name}: samples depend on it on this machine"
            )
        lever = self._lever(name)
        back_off = self._back_offs.lower(lever)
        if back_off is None:
            return self._back_offs.refusal(lever)
        self._fewer[name] = back_off.after
        self.lowered(back_off)
        return ""

    def _lever(self, name: str) -> Lever:
        return Lever(
            role="rollout",
            name=name,
            setting=SETTING,
            configured=self._config.slots,
            now=self.of(name),
            least=self._config.row_block,
            why_least="it is down to rollout.row_block",
            multiple=self._config.row_block,
        )
