"""`contracts.Broadcast` for the driver: the coordinator actor behind deadlines, and the probe."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from treadle.actors.broadcast.config import BroadcastConfig
from treadle.actors.broadcast.probe import Probe
from treadle.actors.calls import call, call_once
from treadle.actors.deaths import GONE, why
from treadle.actors.replaced import Replaced, Told, tell_nobody
from treadle.actors.stacks import ANSWER_S, where
from treadle.platform.errors import BroadcastError, TreadleError
from treadle.platform.memory import remedy
from treadle.platform.metric_names import MISMATCH_MAX
from treadle.platform.records import PublishReport, WeightVersion

_LOG = logging.getLogger(__name__)
T = TypeVar("T")


class CoordinatorLostError(BroadcastError):
    """The coordinator died, or does not answer any more."""


class Broadcaster:
    """Publishes versions for one stage of one driver.

    Example: `broadcast = Broadcaster(coordinator, config, probe)`, then after every learner step
    `report = await broadcast.publish(step + 1)`. `probe` may be replaced between two stages. `launch` starts another
    coordinator over the same ranks and the engines of that moment; without it, losing the coordinator is an error.
    """

    def __init__(
        self,
        coordinator: Any,
        config: BroadcastConfig,
        probe: Probe | None = None,
        launch: Callable[[], Any] | None = None,
    ) -> None:
        self._coordinator = coordinator
        self._launch = launch
        self.restarts = 0
        self.told: Told = tell_nobody
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
        it the first `publish` does the same. A coordinator that is lost meanwhile is replaced."""
        self._token = await self._mended(lambda: self._asked("register", 30.0))
        self._published = 0
        self._version = WeightVersion(step=0)

    async def publish(self, step: int) -> PublishReport:
        """Carries version `step` to the engines; compares engines and learner as often as configured.

        Engines keep their whole version when a coordinator is lost, and ranks their weights: another one publishes the
        same version again. Raises `BroadcastError`, `MismatchError` or `DeadlineError`; see `Coordinator.publish` and
        `Probe.compare`.
        """
        report = await self._mended(lambda: self._published_by_coordinator(step))
        self._version = report.version
        every = self._config.probe_every
        due = self.probe is not None and every > 0 and self._published % every == 0 and report.adopted
        self._published += 1
        return await self._probed(report) if due else report

    async def catch_up(self, name: str, engine: Any) -> WeightVersion | None:
        """Brings a new or respawned engine to the newest version; None when there is none yet."""
        return await self._asked("catch_up", self._config.publish_deadline_s, name, engine)

    async def doing(self) -> str:
        """What the coordinator says it is doing, nothing where it does not answer within a few seconds."""
        try:
            async with asyncio.timeout(ANSWER_S):
                return str(await call(self._coordinator, "phase"))
        except (TimeoutError, *GONE):
            return ""

    async def forget(self, name: str) -> None:
        """Leaves an engine out of later publications; waits for the end of one that is under way."""
        await self._asked("forget", self._config.publish_deadline_s, name)

    async def held(self) -> Mapping[str, WeightVersion]:
        """The version every engine is known to hold."""
        return await self._asked("held", 30.0)

    def close(self) -> None:
        """Ends the coordinator's process."""
        ray.kill(self._coordinator, no_restart=True)

    async def _mended(self, work: Callable[[], Awaitable[T]]) -> T:
        """The work, begun again with another coordinator where one is lost in it."""
        lost: list[tuple[float, str]] = []
        while True:
            try:
                done = await work()
                break
            except CoordinatorLostError as error:
                if self._launch is None or self.restarts >= self._config.max_restarts:
                    raise
                _LOG.warning("broadcast: replacing the coordinator: %s", error)
                lost.append((time.monotonic(), error.message))
                self.close()
                self._coordinator, self._token = self._launch(), 0
                self.restarts += 1
        for noticed_s, cause in lost:
            seconds = time.monotonic() - noticed_s
            self.told(Replaced(role="coordinator", name="coordinator", cause=cause, seconds=seconds))
        return done

    async def _published_by_coordinator(self, step: int) -> PublishReport:
        if not self._token:
            self._token = await self._asked("register", 30.0)
        report: PublishReport = await self._asked(
            "publish", self._config.publish_deadline_s, step, self._token
        )
        return report

    async def _probed(self, report: PublishReport) -> PublishReport:
        assert self.probe is not None
        difference = await self.probe.compare(report.version, report.adopted)
        return dataclasses.replace(report, metrics={**report.metrics, MISMATCH_MAX: difference})

    async def _asked(self, method: str, deadline_s: float, *args: Any) -> Any:
        coordinator = self._coordinator
        asked = call_once(coordinator, method, *args)
        try:
            answer = asyncio.wait_for(asked, deadline_s)
            if method == "register":  # it begins with the start of a process, which says nothing
                return await answer
            return await self._unless_silent(method, coordinator, answer)
        except TimeoutError as error:
            raise CoordinatorLostError(
                f"broadcast.{method}: the weight coordinator did not answer within {deadline_s:g} s; "
                f"{await where(coordinator)}.",
                "Look for a frozen coordinator, or raise the deadlines under broadcast.",
            ) from error
        except RayTaskError as error:
            if isinstance(error.cause, TreadleError):
                raise error.cause from None
            raise BroadcastError(
                f"broadcast.{method}: the weight coordinator failed: {error.cause!r}"
            ) from error
        except GONE as error:
            raise CoordinatorLostError(
                f"broadcast.{method}: the weight coordinator has died ({(cause := why(error))}).",
                remedy("coordinator", cause, "Start the run again with `treadle resume`."),
            ) from error

    async def _unless_silent(self, method: str, coordinator: Any, answer: Coroutine[Any, Any, Any]) -> Any:
        """The answer, unless the coordinator falls silent before it comes. Raises `CoordinatorLostError` then."""
        answering = asyncio.create_task(answer)
        listening = asyncio.create_task(_silence(coordinator, self._config))
        try:
            await asyncio.wait({answering, listening}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            raise CoordinatorLostError(
                f"broadcast.{method}: the weight coordinator has been silent for "
                f"{self._config.silence_deadline_s:g} s; before, {listening.result()}; {await where(coordinator)}.",
                "Look at its node; broadcast.silence_deadline_s allows longer silences.",
            )
        finally:
            answering.cancel()
            listening.cancel()


async def _silence(coordinator: Any, config: BroadcastConfig) -> str:
    """What a coordinator was doing that has not answered for `silence_deadline_s`.

    consumes: phases; waits for: the answers, asked for every `heartbeat_s`; unblocked by: silence, or being cancelled;
    produces: the last phase. A coordinator that dies ends its calls, and is nothing for this.
    """
    before = "it had begun"
    while True:
        await asyncio.sleep(config.heartbeat_s)
        try:
            async with asyncio.timeout(config.silence_deadline_s):
                before = str(await call(coordinator, "phase"))
        except TimeoutError:
            return before
        except GONE:
            await asyncio.get_running_loop().create_future()
