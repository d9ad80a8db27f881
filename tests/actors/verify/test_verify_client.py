"""The client of the pool, over real process pools in this process, with actors that die, hang or lie."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import numpy as np
import pytest
from tests.actors.verify.pool_helpers import ODD, children, odd_config, statuses

from treadle.actors.replaced import Replaced
from treadle.actors.verify.asked import JudgeRequest
from treadle.actors.verify.client import ActorLostError, VerifierPool
from treadle.actors.verify.config import VerifyConfig
from treadle.actors.verify.pool import ProcessPool
from treadle.platform.contracts import Verifiers
from treadle.platform.errors import ConfigError, VerifierError
from treadle.platform.records import Drawn, Json, Prompt, StopReason, Verdict, WeightVersion

pytestmark = pytest.mark.processes

T = TypeVar("T")


class LocalHandle:
    """A process pool in place of an actor. `kill` is abrupt for callers: they learn that it is gone."""

    def __init__(self, config: VerifyConfig) -> None:
        self.pool = ProcessPool(config)
        self.gone = asyncio.Event()
        self.hangs = False
        self.asked = 0

    async def judge(self, request: JudgeRequest, texts: object) -> tuple[Verdict, ...]:
        self.asked += 1
        assert isinstance(texts, tuple)
        return await self._unless_gone(self.pool.judge(request, texts))

    async def ping(self) -> None:
        await self._unless_gone(asyncio.sleep(0))

    async def resize(self, processes: int) -> None:
        self.pool.resize(processes)
        await self._unless_gone(asyncio.sleep(0))

    async def where(self) -> str:
        return "it is a fake that hangs"

    def kill(self) -> None:
        self.gone.set()

    async def _unless_gone(self, call: Awaitable[T]) -> T:
        answer = asyncio.ensure_future(call)
        gone = asyncio.ensure_future(self.gone.wait())
        try:
            if self.hangs:
                await gone
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if self.gone.is_set():
                raise ActorLostError("verify: the actor is gone.")
            return await answer
        finally:
            answer.cancel()
            gone.cancel()


def drawn(*texts: str, verifier: str = "odd", **payload: Json) -> Drawn:
    version = WeightVersion(step=0)
    return Drawn(
        id="grpo/3",
        prompt=Prompt(
            id="p", text="?", token_ids=np.array([1], np.int32), verifier=verifier, payload=payload
        ),
        group=None,
        texts=texts,
        lengths=(1,) * len(texts),
        stops=(StopReason.EOS,) * len(texts),
        oldest=version,
        newest=version,
        worker="w",
        wall_s=0.0,
    )


def with_client(config: VerifyConfig, body: Callable[[VerifierPool, list[LocalHandle]], Awaitable[T]]) -> T:
    handles: list[LocalHandle] = []

    async def spawn(index: int) -> LocalHandle:
        assert 0 <= index < config.actors
        handle = LocalHandle(config)
        await handle.pool.start()
        handles.append(handle)
        return handle

    async def main() -> T:
        async with asyncio.timeout(60):
            client = VerifierPool(config, spawn)
            await client.start()
            try:
                return await body(client, handles)
            finally:
                await client.close()
                for handle in handles:
                    await handle.pool.close()
                assert children() == []

    return asyncio.run(main())


def test_groups_are_spread_over_the_actors() -> None:
    async def body(client: VerifierPool, handles: list[LocalHandle]) -> list[int]:
        assert isinstance(client, Verifiers)
        answers = await asyncio.gather(*(client.judge(drawn("sleep 0.1", "ok")) for _ in range(8)))
        assert all(statuses(answer) == ["scored", "scored"] for answer in answers)
        return [handle.asked for handle in handles]

    assert with_client(odd_config(actors=2), body) == [4, 4]


def test_a_group_whose_actor_dies_is_judged_by_its_replacement() -> None:
    async def body(client: VerifierPool, handles: list[LocalHandle]) -> tuple[Verdict, ...]:
        told: list[Replaced] = []
        client.told = told.append
        waiting = [asyncio.create_task(client.judge(drawn("sleep 0.3", "ok"))) for _ in range(3)]
        await asyncio.sleep(0.1)
        handles[0].kill()
        answers = await asyncio.gather(*waiting)
        assert len(handles) == 2
        assert [(one.role, one.name) for one in told] == [("verify", "verify-0")]
        assert all(statuses(answer) == ["scored", "scored"] for answer in answers)
        assert statuses(await client.judge(drawn("ok"))) == ["scored"]
        assert client.stats().scored == 7
        return answers[0]

    with_client(odd_config(), body)


def test_with_the_respawns_used_up_groups_fail_and_later_calls_raise() -> None:
    async def body(client: VerifierPool, handles: list[LocalHandle]) -> None:
        for round_ in range(2):
            handles[round_].kill()
            verdicts = await client.judge(drawn("ok", "ok"))
            assert statuses(verdicts) == (["scored"] * 2 if round_ == 0 else ["failed"] * 2)
        assert all(np.isnan(verdict.reward) for verdict in verdicts)
        assert "grpo/3" in verdicts[0].detail
        with pytest.raises(
            VerifierError, match=r"left after 1 respawns; first cause: verify-0, judging grpo/3.*respawns"
        ):
            await client.judge(drawn("ok"))

    with_client(odd_config(respawns=1), body)


def test_the_deadline_gives_timed_out_verdicts_and_keeps_an_actor_that_answers() -> None:
    async def body(client: VerifierPool, handles: list[LocalHandle]) -> None:
        began = time.monotonic()
        verdicts = await client.judge(drawn(*["sleep 0.4"] * 20))
        assert time.monotonic() - began < 3.0
        assert statuses(verdicts) == ["timed_out"] * 20
        assert "verify.judge_deadline_s=1.5" in verdicts[0].detail
        await asyncio.sleep(0.1)
        assert len(handles) == 1

    with_client(odd_config(judge_deadline_s=1.5), body)


def test_an_actor_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.actors.verify.client.PING_DEADLINE_S", 0.3)

    async def body(client: VerifierPool, handles: list[LocalHandle]) -> None:
        handles[0].hangs = True
        assert statuses(await client.judge(drawn("ok"))) == ["timed_out"]
        async with asyncio.timeout(10):
            while len(handles) < 2:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)
        assert statuses(await client.judge(drawn("ok"))) == ["scored"]

    with_client(odd_config(judge_deadline_s=1.2), body)


def test_a_mistake_in_the_call_is_failed_verdicts_and_no_lost_actor() -> None:
    async def body(client: VerifierPool, handles: list[LocalHandle]) -> None:
        broken = drawn("ok", "ok")
        object.__setattr__(broken, "texts", ("ok",))
        verdicts = await client.judge(broken)
        assert statuses(verdicts) == ["failed", "failed"]
        assert "1 completions, 2 stops" in verdicts[0].detail
        assert len(handles) == 1

    with_client(odd_config(), body)


def test_an_actor_that_cannot_start_stops_the_start_and_ends_the_others() -> None:
    started: list[LocalHandle] = []

    async def spawn(index: int) -> LocalHandle:
        if index == 1:
            raise VerifierError("verify, start: no room.")
        started.append(LocalHandle(odd_config()))
        return started[-1]

    async def main() -> None:
        await VerifierPool(odd_config(actors=3), spawn).start()

    with pytest.raises(VerifierError, match="no room"):
        asyncio.run(main())
    assert [handle.gone.is_set() for handle in started] == [True, True]


def test_the_odd_verifiers_are_known_to_the_configuration() -> None:
    assert set(odd_config().custom) == set(ODD)


def test_a_slow_actor_is_hedged_by_another_and_the_first_answer_counts() -> None:
    async def body(client: VerifierPool, handles: list[LocalHandle]) -> tuple[list[str], float, int, int]:
        first = client.handles[0]
        assert isinstance(first, LocalHandle)
        first.hangs = True
        began = time.monotonic()
        verdicts = await client.judge(drawn("ok", "ok"))
        wall_s = time.monotonic() - began
        for _ in range(100):
            if len(handles) == 3:
                break
            await asyncio.sleep(0.1)
        return statuses(verdicts), wall_s, client.hedged, len(handles)

    found, wall_s, hedged, started = with_client(odd_config(actors=2, hedge_after_s=0.3), body)
    assert found == ["scored", "scored"]
    assert 0.3 <= wall_s < 3.0
    assert hedged == 1
    assert started == 3, "an actor that does not answer a ping was replaced"


def test_a_quick_actor_is_not_hedged() -> None:
    async def body(client: VerifierPool, handles: list[LocalHandle]) -> tuple[int, list[int]]:
        for _ in range(4):
            assert statuses(await client.judge(drawn("ok"))) == ["scored"]
        return client.hedged, [handle.asked for handle in handles]

    hedged, asked = with_client(odd_config(actors=2, hedge_after_s=5.0), body)
    assert hedged == 0
    assert sum(asked) == 4


def test_processes_join_and_leave_while_groups_are_judged_and_none_is_lost() -> None:
    async def body(client: VerifierPool, handles: list[LocalHandle]) -> None:
        judging = [asyncio.create_task(client.judge(drawn("sleep 0.3", "ok"))) for _ in range(12)]
        await client.resize(3)
        assert client.processes == 3
        await until(lambda: [handle.pool.stats().processes for handle in handles] == [3, 3])
        await asyncio.sleep(0.1)
        await client.resize(1)
        answers = await asyncio.gather(*judging)
        assert all(statuses(answer) == ["scored", "scored"] for answer in answers)
        await until(lambda: [handle.pool.stats().processes for handle in handles] == [1, 1])
        assert client.stats().failed == 0

    with_client(odd_config(actors=2, queue_age_s=30.0), body)


def test_an_actor_that_replaces_another_has_as_many_processes() -> None:
    async def body(client: VerifierPool, handles: list[LocalHandle]) -> None:
        await client.resize(3)
        handles[0].kill()
        assert statuses(await client.judge(drawn("ok"))) == ["scored"]
        assert len(handles) == 2
        await until(lambda: handles[1].pool.stats().processes == 3)

    with_client(odd_config(), body)


def test_an_actor_that_does_not_hear_of_a_change_is_replaced_by_one_of_the_new_size() -> None:
    async def body(client: VerifierPool, handles: list[LocalHandle]) -> None:
        handles[0].kill()
        await client.resize(2)
        await until(lambda: len(client.handles) == 1)
        assert handles[1].pool.stats().processes == 2

    with_client(odd_config(), body)


def test_more_processes_than_the_most_are_refused_and_nothing_changes() -> None:
    async def body(client: VerifierPool, handles: list[LocalHandle]) -> None:
        with pytest.raises(ConfigError, match=r"verify\.max_processes=2"):
            await client.resize(3)
        assert (client.processes, handles[0].pool.stats().processes) == (1, 1)

    with_client(odd_config(max_processes=2), body)


def test_groups_go_to_the_others_while_the_cluster_has_no_place_for_a_replacement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("treadle.actors.verify.client._LOOK_S", 0.02)
    monkeypatch.setattr("treadle.actors.verify.client._NO_PLACE_S", 0.1)

    async def body(client: VerifierPool, handles: list[LocalHandle]) -> None:
        placed, missing = False, list[str]()

        async def has_place(index: int) -> bool:
            return placed or index != 0

        client.placed, client.missing = has_place, lambda name, _: missing.append(name)
        first, second = client.handles
        assert isinstance(first, LocalHandle)
        assert isinstance(second, LocalHandle)
        first.kill()
        answers = await asyncio.gather(*(client.judge(drawn("ok")) for _ in range(6)))
        assert all(statuses(answer) == ["scored"] for answer in answers)
        await until(lambda: missing == ["verify-0"])
        assert client.handles == (second,)
        placed = True
        await until(lambda: len(client.handles) == 2)
        assert missing == ["verify-0"], "told once"

    with_client(odd_config(actors=2), body)


def test_groups_wait_for_the_only_actors_replacement() -> None:
    async def body(client: VerifierPool, handles: list[LocalHandle]) -> None:
        placed = False

        async def has_place(_: int) -> bool:
            return placed

        client.placed = has_place
        handles[0].kill()
        waiting = [asyncio.create_task(client.judge(drawn("ok"))) for _ in range(3)]
        await until(lambda: not client.handles)
        waiting.append(asyncio.create_task(client.judge(drawn("ok"))))
        await asyncio.sleep(0.1)
        placed = True
        for one in waiting:
            assert statuses(await one) == ["scored"]

    with_client(odd_config(), body)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.02)
