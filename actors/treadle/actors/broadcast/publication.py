"""One version on its way: what the learner offered, what the engines made of it, and the figures of both."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from treadle.actors.broadcast.phases import Offer, Outcome, Route
from treadle.platform import metric_names as names
from treadle.platform.errors import BroadcastError
from treadle.platform.records import Offered, WeightVersion


class Source(Protocol):
    """A rank of the learner."""

    async def publish(self, step: int, bases: Collection[str]) -> Offered | None:
        """Takes part in the gathering; the rank that packed the version returns how to reach it from the digests
        `bases`, "" for none."""
        ...

    async def dense(self, step: int) -> Offer:
        """Manifest and ticket of all of the version that this rank packed last."""
        ...

    async def doing(self) -> str:
        """What it says it is doing, and in which function; within a few seconds."""
        ...


class Publication:
    """A version as its source offered it. The dense offer is asked for when somebody needs it, and once."""

    def __init__(self, source: Source, offered: Offered, deadline_s: float) -> None:
        self.version: WeightVersion = offered.dense.version
        self.dense_bytes = offered.dense.total_bytes
        self.metrics = offered.metrics
        self._source = source
        self._deadline_s = deadline_s
        self._ways = {"" if way[0].base is None else way[0].base.digest: way for way in offered.ways}
        self._asking = asyncio.Lock()

    async def route(self, base: str) -> Route:
        """The way of an engine that holds the digest `base`; "" for one that holds nothing of use."""
        return Route(offer=self._ways.get(base) or await self.dense(), dense=self.dense)

    async def dense(self) -> Offer:
        """Raises `BroadcastError` when the source has a newer version by now, or does not answer in time."""
        async with self._asking:
            if "" not in self._ways:
                asked = self._source.dense(self.version.step)
                try:
                    self._ways[""] = await asyncio.wait_for(asked, self._deadline_s)
                except TimeoutError as error:
                    raise BroadcastError(
                        f"broadcast.dense: the learner did not offer all of version {self.version.step} within "
                        f"{self._deadline_s:g} s.",
                        "Raise broadcast.gather_deadline_s, or look for a frozen rank.",
                    ) from error
            return self._ways[""]


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """A version after both phases: outcomes of all engines in the first, and of those that came to the second."""

    adopted: tuple[str, ...]
    behind: tuple[str, ...]
    staged: tuple[Outcome, ...]
    flipped: tuple[Outcome, ...]
    stage_s: float
    flip_s: float

    @property
    def sent_bytes(self) -> int:
        """Repeated fetches included."""
        return sum(outcome.sent_bytes for outcome in (*self.staged, *self.flipped))


def figures(
    publication: Publication, carried: Carried, gathered_s: float, lags: Mapping[str, int]
) -> dict[str, float]:
    """The publication by metric name. `gathered_s` is the whole first part, `lags` the steps that engines are
    behind."""
    outcomes = (*carried.staged, *carried.flipped)
    fetched = [outcome for outcome in carried.staged if not outcome.reason]
    encode_s = publication.metrics.get(names.WEIGHTS_ENCODE_S, 0.0)
    return {
        **publication.metrics,
        names.WEIGHTS_GATHER_S: max(0.0, gathered_s - encode_s),
        names.WEIGHTS_ENCODE_S: encode_s,
        names.WEIGHTS_STAGE_S: carried.stage_s,
        names.WEIGHTS_WIRE_S: max((outcome.wire_s for outcome in fetched), default=0.0),
        names.WEIGHTS_APPLY_S: max((outcome.apply_s for outcome in fetched), default=0.0),
        names.WEIGHTS_FLIP_S: carried.flip_s,
        names.WEIGHTS_DENSE_BYTES: float(publication.dense_bytes * len(fetched)),
        names.WEIGHTS_BY_DELTA: float(sum(outcome.by_delta for outcome in fetched)),
        names.WEIGHTS_REFUSED: float(sum(outcome.refused for outcome in outcomes)),
        **{names.weights_lag(engine): float(lag) for engine, lag in lags.items()},
    }
