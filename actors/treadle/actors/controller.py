"""A controller: the process that plays a run, as a detached actor with a name, so that no client owns it.

The actor is a thread that does the work and an event loop that answers. What the work starts belongs to the actor and
dies with it. Ray gives a name to one actor alone and never starts this one again (`max_restarts=0`): a second one for
the same run cannot come into being unnoticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from treadle.actors.deaths import why
from treadle.platform.errors import ClusterError, ConfigError, DeadlineError, RoleError
from treadle.platform.records import Outcome

NAMESPACE = "treadle"
LINGER_S = 10.0
"""How long a controller stays after its work, to tell how it ended."""
ANSWER_S = 60.0
"""The longest silence of a controller that is believed to live: its event loop shares the interpreter with the work."""
START_S = 120.0
_GONE_S = 30.0
_ASK_S = 2.0
_PAUSE_S = 0.2

Work = Callable[[Mapping[str, Any]], Outcome]
"""Does all of it; is given what `run.json` is to say of the controller. A failure of the work is its outcome."""


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)
class ControllerActor:
    """Begins its work when it is made: there is no controller without a run."""

    def __init__(self, name: str, address: str, work: Work) -> None:
        context = ray.get_runtime_context()
        self._about = {
            "name": name,
            "namespace": NAMESPACE,
            "address": address,
            "actor": context.get_actor_id(),
            "node": context.get_node_id(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since_unix_s": time.time(),
        }
        self._work = work
        self._outcome: Outcome | None = None
        threading.Thread(target=self._do, name="run", daemon=True).start()

    async def about(self) -> dict[str, Any]:
        """Who this is, and whether its work is over."""
        return {**self._about, "over": self._outcome is not None}

    async def ended(self, wait_s: float) -> Outcome | None:
        """How the work ended; None if it has not within `wait_s`."""
        until = time.monotonic() + wait_s
        while self._outcome is None and time.monotonic() < until:
            await asyncio.sleep(0.1)
        return self._outcome

    def _do(self) -> None:
        try:
            outcome = self._work(self._about)
        except BaseException:  # noqa: BLE001  what the work did not foresee is told, too
            outcome = Outcome(kind="TreadleError", message=traceback.format_exc(limit=-1), exit_code=1)
        self._outcome = outcome
        time.sleep(LINGER_S)
        os._exit(0)


class Controller:
    """A client's hold on a controller. Every question has a deadline, and a controller that is gone is an error in one
    sentence: `RoleError` if it died, `DeadlineError` if it does not answer."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name, self._actor = name, actor
        self.known: Mapping[str, Any] = {}

    def about(self, deadline_s: float = ANSWER_S) -> Mapping[str, Any]:
        """Who it is, as `run.json` says it; also kept as `known`."""
        until = time.monotonic() + deadline_s
        while True:
            try:
                left_s = max(until - time.monotonic(), 0.1)
                self.known = ray.get(self._actor.about.remote(), timeout=left_s)
                return self.known
            except (ActorUnavailableError, GetTimeoutError) as error:
                if time.monotonic() >= until:
                    raise self._silent(deadline_s) from error
                time.sleep(_PAUSE_S)
            except RayError as error:
                raise self._dead(error) from error

    def ended(self, meanwhile: Callable[[float], object]) -> Outcome:
        """Waits for the end of the work and calls `meanwhile` a few times a second, with the seconds since the last
        answer; what it raises ends the wait.

        consumes: the controller's answers; waits for: its work, as long as it answers at all; unblocked by: its answer,
        its death, or `ANSWER_S` of silence; produces: the outcome.
        """
        heard = time.monotonic()
        asked = self._actor.ended.remote(_ASK_S)
        while True:
            ready, _ = ray.wait([asked], timeout=0.3)
            meanwhile(time.monotonic() - heard)
            if not ready:
                if time.monotonic() - heard > ANSWER_S:
                    raise self._silent(ANSWER_S)
                continue
            try:
                outcome: Outcome | None = ray.get(asked)
            except ActorUnavailableError as error:
                if time.monotonic() - heard > ANSWER_S:
                    raise self._silent(ANSWER_S) from error
                time.sleep(_PAUSE_S)
            except RayError as error:
                raise self._dead(error) from error
            else:
                heard = time.monotonic()
                if outcome is not None:
                    return outcome
            asked = self._actor.ended.remote(_ASK_S)

    def kill(self) -> None:
        """Ends it and everything that belongs to it; returns when the name is free. Raises `DeadlineError`."""
        ray.kill(self._actor)
        until = time.monotonic() + _GONE_S
        while find_controller(self.name) is not None:
            if time.monotonic() >= until:
                raise DeadlineError(
                    f"controller {self.name}: it was killed and is not gone after {_GONE_S:g} s.",
                    "Look at its node; it may be cut off.",
                )
            time.sleep(_PAUSE_S)

    def _silent(self, deadline_s: float) -> DeadlineError:
        return DeadlineError(
            f"controller {self.name}: it does not answer for {deadline_s:g} s; it is frozen, or its node or the "
            "cluster's head is cut off."
        )

    def _dead(self, error: RayError) -> RoleError:
        return RoleError(f"controller {self.name}: {why(error)}.")


def start_controller(name: str, address: str, work: Work) -> Controller:
    """A controller that does `work`, on this machine if it can be. `address` is the cluster's, for later clients.

    Raises `ConfigError` where one has the name already, `ClusterError` where none can be started.
    """
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ControllerActor  # what ray.remote returns is untyped
    options = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "scheduling_strategy": here}
    try:
        made = Controller(name, actor.options(**options).remote(name, address, work))
    except ValueError as error:  # ActorAlreadyExistsError is one
        raise ConfigError(
            f"The run has a controller already: {name}.",
            "See it with `treadle attach`, end it with `treadle stop`.",
        ) from error
    try:
        made.about(START_S)
    except RoleError as error:
        with contextlib.suppress(RayError, DeadlineError):
            made.kill()
        raise ClusterError(f"No controller could be started: {error.message}", error.remedy) from error
    return made


def find_controller(name: str) -> Controller | None:
    """The living controller of this name, if there is one."""
    try:
        return Controller(name, ray.get_actor(name, namespace=NAMESPACE))
    except ValueError:
        return None
