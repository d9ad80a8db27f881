"""`contracts.Broadcast` for the driver: the coordinator actor behind deadlines, and the probe."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayTaskError

from treadle.actors.broadcast.config import BroadcastConfig
from treadle.actors.broadcast.probe import Probe
from treadle.platform.errors import BroadcastError, DeadlineError, TreadleError
from treadle.platform.metric_names import MISMATCH_MAX
from treadle.platform.records import PublishReport, WeightVersion

T = TypeVar("T")


class Broadcaster:
    """Publishes versions for one stage of one driver.

    Example: `broadcast = Broadcaster(coordinator, config, probe)`, then after every learner step
    `report = await broadcast.publish(step + 1)`. `probe` may be replaced between two stages.
    """

    def __init__(self, coordinator: Any, config: BroadcastConfig, probe: Probe | None = None) -> None:
        self._coordinator = coordinator
        self._config = config
        self.probe = probe
        self._token = 0
        self._published = 0
        self._version = WeightVersion(step=0)

    @property
    def version(self) -> WeightVersion:
        """The newest published version; step 0 without a digest before the first."""
        return self._version

    async def register(self) -> None:
        """Becomes the only publisher, free to start at any step: for a new stage, or after a resume. Without
        it the first `publish` does the same."""
        self._token = await self._asked("register", 30.0)
        self._published = 0
        self._version = WeightVersion(step=0)

    async def publish(self, step: int) -> PublishReport:
        """Carries version `step` to the engines; compares engines and learner as often as configured.

        Raises `BroadcastError`, `MismatchError` or `DeadlineError`; see `Coordinator.publish` and
        `Probe.compare`.
        """
        if not self._token:
            await self.register()
        report: PublishReport = await self._asked(
            "publish", self._config.publish_deadline_s, step, self._token
        )
        self._version = report.version
        every = self._config.probe_every
        due = self.probe is not None and every > 0 and self._published % every == 0 and report.adopted
        self._published += 1
        return await self._probed(report) if due else report

    async def catch_up(self, name: str, engine: Any) -> WeightVersion | None:
        """Brings a new or respawned engine to the newest version; None when there is none yet."""
        return await self._asked("catch_up", self._config.publish_deadline_s, name, engine)

    async def forget(self, name: str) -> None:
        """Leaves an engine out of later publications."""
        await self._asked("forget", 30.0, name)

    async def held(self) -> Mapping[str, WeightVersion]:
        """The version every engine is known to hold."""
        return await self._asked("held", 30.0)

    async def _probed(self, report: PublishReport) -> PublishReport:
        assert self.probe is not None
        difference = await self.probe.compare(report.version, report.adopted)
        return dataclasses.replace(report, metrics={**report.metrics, MISMATCH_MAX: difference})

    async def _asked(self, method: str, deadline_s: float, *args: Any) -> Any:
        reference: Awaitable[Any] = getattr(self._coordinator, method).remote(*args)
        try:
            return await asyncio.wait_for(reference, deadline_s)
        except TimeoutError as error:
            raise DeadlineError(
                f"broadcast.{method}: the weight coordinator did not answer within {deadline_s:g} s.",
                "Look for a frozen coordinator, or raise the deadlines under broadcast.",
            ) from error
        except RayTaskError as error:
            if isinstance(error.cause, TreadleError):
                raise error.cause from None
            raise BroadcastError(
                f"broadcast.{method}: the weight coordinator failed: {error.cause!r}"
            ) from error
        except RayActorError as error:
            raise BroadcastError(
                f"broadcast.{method}: the weight coordinator has died ({str(error).splitlines()[0]}).",
                "Start the run again with `treadle resume`.",
            ) from error
