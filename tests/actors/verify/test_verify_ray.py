"""The verify actor in a real Ray."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psutil
import pytest
import ray
from tests.actors.verify.pool_helpers import statuses
from tests.actors.verify.test_verify_client import drawn

from treadle.actors.verify.actor import RayVerifyHandle, ray_verifier_pool
from treadle.actors.verify.client import VerifierPool
from treadle.actors.verify.config import VerifyConfig
from treadle.platform.errors import VerifierError
from treadle.platform.records import Drawn, Verdict

pytestmark = pytest.mark.ray

GOOD = "<think>47+85=132</think><answer>132</answer><eos>"
CONFIG = VerifyConfig(processes=2, eos="<eos>", judge_deadline_s=60.0, warm=["exact"], cpus=0.5)


Group = Callable[..., Drawn]


def stored_group(*texts: str) -> Drawn:
    """A group whose completions lie in the object store."""
    return replace(drawn(*texts, verifier="exact", answer="132"), texts=ray.put(texts))


def small_group(*texts: str) -> Drawn:
    """A group whose completions came with it."""
    return drawn(*texts, verifier="exact", answer="132")


@pytest.fixture(params=[stored_group, small_group], ids=["by reference", "by value"])
def group(request: pytest.FixtureRequest) -> Group:
    made: Group = request.param
    return made


def actor_of(pool: VerifierPool) -> Any:
    (handle,) = pool.handles
    assert isinstance(handle, RayVerifyHandle)
    return handle.actor


def verify_processes() -> list[psutil.Process]:
    """Of this test's own Ray, not of another run on the machine."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name() in ("verifier", "verifier-forks"):
                found.append(process)
    return found


def test_groups_are_judged_in_the_actor_and_an_actor_that_dies_is_replaced(
    ray_session: None, group: Group
) -> None:
    async def main() -> None:
        before = {process.pid for process in verify_processes()}
        pool = ray_verifier_pool(CONFIG, lambda index: {"name": f"verify-{index}"})
        await pool.start()
        verdicts = await pool.judge(group(GOOD, "<think>a</think><answer>5</answer><eos>", "132"))
        assert [verdict.reward for verdict in verdicts] == [1.1, 0.1, 1.0]

        mine = [process for process in verify_processes() if process.pid not in before]
        assert sorted(process.name() for process in mine) == ["verifier", "verifier", "verifier-forks"]
        first = actor_of(pool)
        ray.kill(first)
        answers = await asyncio.gather(*(pool.judge(group(GOOD, GOOD)) for _ in range(10)))
        assert all(statuses(answer) == ["scored", "scored"] for answer in answers)
        assert actor_of(pool) is not first
        _, alive = psutil.wait_procs(mine, timeout=5)
        assert alive == [], "processes outlived their actor"
        await pool.close()
        last = [process for process in verify_processes() if process.pid not in before]
        assert psutil.wait_procs(last, timeout=5)[1] == []

    asyncio.run(main())


def test_a_frozen_actor_is_replaced_and_its_group_timed_out(
    ray_session: None, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treadle.actors.verify.client.PING_DEADLINE_S", 1.0)

    async def main() -> tuple[Verdict, ...]:
        pool = ray_verifier_pool(replace(CONFIG, judge_deadline_s=3.0))
        await pool.start()
        server = next(process for process in verify_processes() if process.name() == "verifier-forks")
        first = actor_of(pool)
        os.kill(server.ppid(), signal.SIGSTOP)
        frozen = await pool.judge(group(GOOD))
        async with asyncio.timeout(60):
            while not pool.handles or actor_of(pool) is first:
                await asyncio.sleep(0.2)
        assert statuses(await pool.judge(group(GOOD))) == ["scored"]
        await pool.close()
        return frozen

    assert statuses(asyncio.run(main())) == ["timed_out"]


def test_a_failpoint_that_kills_the_actor_loses_no_group(
    ray_session: None, group: Group, tmp_path: Any
) -> None:
    faults = {
        "env_vars": {
            "TREADLE_FAILPOINTS": "verify.before_return=kill@2;verify.in_child=kill@5",
            "TREADLE_FAILPOINTS_ONCE": str(tmp_path),
        }
    }

    async def main() -> list[Verdict]:
        config = replace(CONFIG, processes=1, cache_entries=0)
        pool = ray_verifier_pool(config, lambda _: {"runtime_env": faults})
        await pool.start()
        answers = [await pool.judge(group(GOOD, GOOD)) for _ in range(4)]
        await pool.close()
        return [verdict for answer in answers for verdict in answer]

    assert statuses(tuple(asyncio.run(main()))) == ["scored"] * 8
    assert len(list(tmp_path.iterdir())) == 2, "a failpoint did not fire"


def test_an_error_nobody_foresaw_is_a_failed_verdict_however_the_completions_travel(
    ray_session: None, group: Group
) -> None:
    faults = {"env_vars": {"TREADLE_FAILPOINTS": "verify.before_judge=raise:odd"}}

    async def main() -> list[str]:
        pool = ray_verifier_pool(CONFIG, lambda _: {"runtime_env": faults})
        await pool.start()
        first, second = await pool.judge(group(GOOD)), await pool.judge(group(GOOD))
        await pool.close()
        assert "FailpointError" in first[0].detail
        return statuses(first) + statuses(second)

    assert asyncio.run(main()) == ["failed", "scored"]


def test_lost_completions_are_failed_verdicts(ray_session: None) -> None:
    @ray.remote
    def raises() -> tuple[str, ...]:
        raise RuntimeError("the worker's texts are gone")

    async def main() -> tuple[Verdict, ...]:
        pool = ray_verifier_pool(CONFIG)
        await pool.start()
        verdicts = await pool.judge(replace(stored_group(GOOD), texts=raises.remote()))
        await pool.close()
        return verdicts

    verdicts = asyncio.run(main())
    assert statuses(verdicts) == ["failed"]
    assert "texts are gone" in verdicts[0].detail


def test_an_actor_that_cannot_be_placed_or_built_says_so(ray_session: None) -> None:
    async def main(config: VerifyConfig) -> None:
        await ray_verifier_pool(config).start()

    began = time.monotonic()
    with pytest.raises(VerifierError, match=r"startup_deadline_s=2; it does not say where.*verify.cpus"):
        asyncio.run(main(replace(CONFIG, cpus=99.0, startup_deadline_s=2.0)))
    with pytest.raises(VerifierError, match="no_such_module"):
        asyncio.run(main(replace(CONFIG, custom={"mine": "no_such_module:Mine"}, warm=["mine"])))
    assert time.monotonic() - began < 60
