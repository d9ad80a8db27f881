"""The Ray shell of the process pool, and how the client reaches it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import ray
from ray.exceptions import RayError, RayTaskError

from treadle.actors.calls import call, call_once, once
from treadle.actors.deaths import GONE, why
from treadle.actors.mail import Courier, Letter, Mailbox, Reply
from treadle.actors.stacks import where
from treadle.actors.verify.asked import JudgeRequest
from treadle.actors.verify.client import ActorLostError, VerifierPool, VerifyHandle
from treadle.actors.verify.config import VerifyConfig
from treadle.actors.verify.pool import ProcessPool
from treadle.platform.errors import RoleError, TreadleError, VerifierError
from treadle.platform.memory import remedy
from treadle.platform.records import Ref, Verdict
from treadle.platform.rollcall import enlist
from treadle.platform.stacks import places

_LINGER_S = 0.005
"""Groups that came together are judged within moments of each other: their verdicts are fetched in one call."""
Asked: TypeAlias = tuple[JudgeRequest, tuple[str, ...]]
Verdicts: TypeAlias = tuple[Verdict, ...]


# Ray would restart it without its processes, and without counting: the client replaces it within a budget.
@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"health": 1})
class VerifyActor:
    """See `ProcessPool`. Async, so that many groups wait in it at once; `where` answers while everything else hangs."""

    def __init__(self, config: VerifyConfig, index: int = 0) -> None:
        enlist(f"verify-{index}")
        self._pool = ProcessPool(config)
        self._mail = Mailbox("verify, judge", self._judged, _LINGER_S)

    @once
    async def start(self) -> None:
        await self._pool.start()

    async def judge(self, request: JudgeRequest, texts: tuple[str, ...]) -> tuple[Verdict, ...]:
        return await self._pool.judge(request, texts)

    @once
    async def post(self, letters: Sequence[Letter[Asked]]) -> None:
        """Judges completions that came by value; `fetch` gives the verdicts out."""
        self._mail.post(letters)

    @once
    async def fetch(self) -> list[Reply[Verdicts]]:
        """See `Mailbox.fetch`."""
        return await self._mail.fetch()

    async def _judged(self, asked: Asked) -> Verdicts:
        return await self._pool.judge(*asked)

    async def ping(self) -> None:
        """Answers while the event loop turns."""

    async def resize(self, processes: int) -> None:
        self._pool.resize(processes)

    @ray.method(concurrency_group="health")
    async def where(self) -> str:
        return places()


class RayVerifyHandle:
    """Implements `client.VerifyHandle` over an actor handle, which stays reachable as `actor`."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._courier: Courier[Asked, Verdicts] = Courier(self._post, self._fetch)

    async def start(self) -> None:
        await _answer(call_once(self.actor, "start"), "start")

    async def judge(self, request: JudgeRequest, texts: Ref) -> tuple[Verdict, ...]:
        if not isinstance(texts, ray.ObjectRef):
            return await self._by_value(request, texts)
        # As an argument of its own the reference is resolved in the actor: completions pass the driver by.
        verdicts: Verdicts = await _answer(call(self.actor, "judge", request, texts), "judge")
        return verdicts

    async def _by_value(self, request: JudgeRequest, texts: tuple[str, ...]) -> Verdicts:
        try:
            return await self._courier.ask((request, texts))
        except RoleError:
            raise
        except TreadleError as error:  # says nothing about the samples either: as when they go by reference
            raise VerifierError(f"verify, judge: {type(error).__name__}: {error}."[:500]) from error

    async def ping(self) -> None:
        await _answer(call(self.actor, "ping"), "ping")

    async def resize(self, processes: int) -> None:
        await _answer(call(self.actor, "resize", processes), "resize")

    async def where(self) -> str:
        return await where(self.actor)

    def kill(self) -> None:
        ray.kill(self.actor, no_restart=True)

    async def _post(self, letters: Sequence[Letter[Asked]]) -> None:
        await _answer(call_once(self.actor, "post", letters), "judge")

    async def _fetch(self) -> list[Reply[Verdicts]]:
        replies: list[Reply[Verdicts]] = await _answer(call_once(self.actor, "fetch"), "judge")
        return replies


def ray_verifier_pool(
    config: VerifyConfig, options: Callable[[int], Mapping[str, Any]] | None = None
) -> VerifierPool:
    """A pool over Ray actors, not started yet. `options(index)` are actor options that win over the config's:
    where actor `index` is placed, its `runtime_env`.

    Example: `pool = ray_verifier_pool(config, lambda i: placement.options("verify", i)); await pool.start()`.
    """

    async def spawn(index: int) -> VerifyHandle:
        chosen = {"num_cpus": config.cpus, **(options(index) if options else {})}
        actor: Any = VerifyActor  # what ray.remote returns is untyped
        handle = RayVerifyHandle(actor.options(**chosen).remote(config, index))
        try:
            async with asyncio.timeout(config.startup_deadline_s):
                await handle.start()
        except TimeoutError as error:
            found = await handle.where()
            handle.kill()
            raise VerifierError(
                f"verify, start: actor {index} is not up within "
                f"verify.startup_deadline_s={config.startup_deadline_s:g}; {found}.",
                "Free CPUs on the cluster, or lower verify.cpus.",
            ) from error
        except BaseException:
            handle.kill()
            raise
        return handle

    return VerifierPool(config, spawn)


async def _answer(reference: Any, doing: str) -> Any:
    """Awaits a call. The death of the actor becomes `ActorLostError`, what else went wrong a `VerifierError`
    (completions may be lost with the node that drew them)."""
    try:
        return await reference
    except GONE as error:
        cause = why(error)
        raise ActorLostError(f"verify, {doing}: {cause}.", remedy("verify", cause)) from error
    except RayTaskError as error:
        if isinstance(error.cause, RoleError):
            raise error.cause from error
        raise VerifierError(f"verify, {doing}: {type(error.cause).__name__}: {error.cause}."[:500]) from error
    except RayError as error:
        raise VerifierError(f"verify, {doing}: {type(error).__name__}: {error}."[:500]) from error
