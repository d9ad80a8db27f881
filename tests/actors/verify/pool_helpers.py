"""Small things the pool's tests share."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import psutil

from treadle.actors.verify.asked import JudgeRequest
from treadle.actors.verify.config import VerifyConfig
from treadle.actors.verify.pool import ProcessPool
from treadle.platform.records import Json, Verdict

T = TypeVar("T")
ODD = {
    name: f"tests.actors.verify.odd_verifiers:{attribute}"
    for name, attribute in {
        "odd": "Odd",
        "unbuildable": "Unbuildable",
        "slow-to-build": "SlowToBuild",
        "unknown-part": "UnknownPart",
        "dies-when-built": "DiesWhenBuilt",
        "missing": "NoSuchName",
    }.items()
}
BARE = {"accuracy": 1.0}


def odd_config(**changes: object) -> VerifyConfig:
    """One process, the odd verifiers, deadline 1 s, no format part."""
    settings: dict[str, object] = {"processes": 1, "custom": ODD, "parts": BARE, "deadline_s": 1.0, **changes}
    return VerifyConfig(**settings)  # type: ignore[arg-type]


@asynccontextmanager
async def running(config: VerifyConfig) -> AsyncIterator[ProcessPool]:
    """A started pool that leaves no process behind."""
    pool = ProcessPool(config)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()
        assert children() + fork_servers() == []


async def judged(
    pool: ProcessPool, *texts: str, verifier: str = "odd", finished: bool = True, **payload: Json
) -> tuple[Verdict, ...]:
    request = JudgeRequest(
        group_id="g", prompt_id="p", verifier=verifier, payload=payload, finished=(finished,) * len(texts)
    )
    return await pool.judge(request, texts)


def with_pool(config: VerifyConfig, body: Callable[[ProcessPool], Awaitable[T]]) -> T:
    """Runs the body against a started pool, within two minutes."""

    async def main() -> T:
        async with asyncio.timeout(120), running(config) as pool:
            return await body(pool)

    return asyncio.run(main())


def children() -> list[int]:
    """Verifier processes of this process."""
    return _named("verifier")


def fork_servers() -> list[int]:
    """The processes that those are forked from."""
    return _named("verifier-forks")


def _named(name: str) -> list[int]:
    found = []
    for child in psutil.Process(os.getpid()).children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE and child.name() == name:
                found.append(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def assert_no_children() -> None:
    """An actor is killed by a message to its node: its processes go with it, a moment later."""
    deadline = time.monotonic() + 10
    while children() + fork_servers() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert children() + fork_servers() == []


def statuses(verdicts: tuple[Verdict, ...]) -> list[str]:
    return [verdict.status.value for verdict in verdicts]
