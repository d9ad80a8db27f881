"""What `Verifiers` promise to the workflows, asked of the pool over Ray and of the same pool without Ray."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import pytest
from tests.actors.verify.pool_helpers import assert_no_children, odd_config, statuses
from tests.actors.verify.test_verify_client import LocalHandle, drawn

from treadle.actors.verify.client import VerifierPool
from treadle.platform.contracts import Verifiers
from treadle.platform.records import Drawn

pytestmark = pytest.mark.processes

T = TypeVar("T")
Make = Callable[[], VerifierPool]
CONFIG = odd_config(parts={"accuracy": 1.0, "format": 0.1}, judge_deadline_s=60.0)


def without_ray() -> VerifierPool:
    async def spawn(index: int) -> LocalHandle:
        handle = LocalHandle(CONFIG)
        await handle.pool.start()
        return handle

    return VerifierPool(CONFIG, spawn)


def with_ray() -> VerifierPool:
    from treadle.actors.verify.actor import ray_verifier_pool

    return ray_verifier_pool(CONFIG)


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def make(request: pytest.FixtureRequest) -> Make:
    if request.param == "ray":
        request.getfixturevalue("ray_session")
        return with_ray
    return without_ray


def with_verifiers(make: Make, body: Callable[[Verifiers], Awaitable[T]]) -> T:
    async def main() -> T:
        async with asyncio.timeout(120):
            pool = make()
            await pool.start()
            try:
                return await body(pool)
            finally:
                handles = pool.handles
                await pool.close()
                for handle in handles:
                    if isinstance(handle, LocalHandle):
                        await handle.pool.close()

    return asyncio.run(main())


def answers(*values: str) -> Drawn:
    texts = tuple(f"<think>t</think><answer>{value}</answer>" for value in values)
    return drawn(*texts, verifier="exact", answer="7")


def test_one_verdict_per_sample_in_order(make: Make) -> None:
    async def body(verifiers: Verifiers) -> None:
        assert isinstance(verifiers, Verifiers)
        verdicts = await verifiers.judge(answers("7", "8", "7"))
        assert [verdict.reward for verdict in verdicts] == [1.1, 0.1, 1.1]
        assert [dict(verdict.parts)["accuracy"] for verdict in verdicts] == [1.0, 0.0, 1.0]
        many = await asyncio.gather(*(verifiers.judge(answers(*"7" * n)) for n in range(1, 9)))
        assert [len(group) for group in many] == list(range(1, 9))

    with_verifiers(make, body)
    assert_no_children()


def test_broken_slow_and_dying_verifiers_never_give_a_zero(make: Make) -> None:
    async def body(verifiers: Verifiers) -> None:
        texts = ("raise x", "sleep 30", "exit 3", "spin")
        verdicts = await verifiers.judge(replace(drawn(*texts)))
        assert statuses(verdicts) == ["failed", "timed_out", "failed", "timed_out"]
        assert all(math.isnan(verdict.reward) and verdict.detail for verdict in verdicts)
        unknown = await verifiers.judge(drawn("ok", verifier="no-such-verifier"))
        assert statuses(unknown) == ["failed"]
        assert statuses(await verifiers.judge(answers("7"))) == ["scored"]

    with_verifiers(make, body)
    assert_no_children()


def test_a_caller_that_gives_up_harms_nobody(make: Make) -> None:
    async def body(verifiers: Verifiers) -> None:
        waiting = asyncio.create_task(verifiers.judge(drawn("sleep 0.5")))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert statuses(await verifiers.judge(answers("7"))) == ["scored"]

    with_verifiers(make, body)
