"""The pool as a service: what waits, who is asked first, what is remembered, how many processes there are."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from tests.actors.verify.pool_helpers import children, judged, odd_config, statuses, with_pool

from treadle.actors.verify.cache import VerdictCache, sample_key, task_key
from treadle.actors.verify.config import VerifierLimits, VerifyConfig
from treadle.actors.verify.pool import ProcessPool
from treadle.actors.verify.scaling import Load, wanted_processes
from treadle.actors.verify.verdicts import scored, unscored
from treadle.platform.errors import ConfigError, VerifierError
from treadle.platform.records import Verdict, VerdictStatus

pytestmark = pytest.mark.processes

LOAD = Load(waiting_samples=100, age_s=0.6, stuck=0, busy=1, service_s=0.01)


def test_a_verifier_with_options_of_its_own_gets_them() -> None:
    config = odd_config(options={"odd": {"bonus": 0.5}})
    (verdict,) = with_pool(config, lambda pool: judged(pool, "ok"))
    assert verdict.reward == 1.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"odd": {"bonos": 1.0}}, "verify.options.odd.bonos is not an option of odd. Its options: bonus"),
        ({"odd": {"bonus": "much"}}, "verify.options.odd.bonus='much' is not a float"),
        ({"odd": {"bonus": True}}, "verify.options.odd.bonus=True is not a float"),
        (
            {"exact": {"bonus": 1.0}},
            "verify.options.exact.bonus is not an option of exact. It has no options",
        ),
    ],
)
def test_an_option_that_a_verifier_does_not_have_keeps_the_pool_from_starting(
    options: dict[str, dict[str, object]], says: str
) -> None:
    config = odd_config(options=options, warm=list(options))
    with pytest.raises(VerifierError) as raised:
        with_pool(config, lambda pool: judged(pool, "ok"))
    assert says in str(raised.value)
    assert children() == []


@pytest.mark.parametrize("where", ["options", "limits", "pins"])
def test_settings_of_an_unknown_verifier_are_refused(where: str) -> None:
    value = {"options": {}, "limits": VerifierLimits(), "pins": "1"}[where]
    with pytest.raises(ConfigError, match=rf"verify.{where} names the verifier 'maths'"):
        VerifyConfig(**{where: {"maths": value}}).check()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (VerifierLimits(deadline_s=0.0), "verify.limits.exact.deadline_s=0.0"),
        (VerifierLimits(deadline_s=500.0), "verify.judge_deadline_s=120.0"),
        (VerifierLimits(processes=0), "verify.limits.exact.processes=0"),
    ],
)
def test_limits_of_a_verifier_that_cannot_work_are_named(limits: VerifierLimits, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        VerifyConfig(limits={"exact": limits}).check()


def test_a_verifier_has_the_deadline_that_was_set_for_it() -> None:
    config = odd_config(limits={"odd": VerifierLimits(deadline_s=0.3)}, deadline_s=30.0)
    (verdict,) = with_pool(config, lambda pool: judged(pool, "sleep 20"))
    assert verdict.status is VerdictStatus.TIMED_OUT
    assert verdict.detail == "odd: no verdict within verify.limits.odd.deadline_s=0.3"
    assert 0.3 <= verdict.wall_s < 1.3


def test_a_verifier_with_one_process_leaves_the_others_to_other_verifiers() -> None:
    async def body(pool: ProcessPool) -> tuple[float, float]:
        await judged(pool, "5", verifier="exact", answer="5")
        began = time.monotonic()
        slow = [asyncio.create_task(judged(pool, "sleep 0.6")) for _ in range(3)]
        await asyncio.sleep(0.1)
        await judged(pool, "5", verifier="exact", answer="5")
        quick_s = time.monotonic() - began
        await asyncio.gather(*slow)
        return quick_s, time.monotonic() - began

    limits = {"odd": VerifierLimits(processes=1)}
    config = odd_config(processes=2, max_processes=2, limits=limits, deadline_s=20.0, batch_samples=1)
    quick_s, slow_s = with_pool(config, body)
    assert quick_s < 0.6, "the second process was free for it"
    assert slow_s > 1.8, "one after the other"


def test_what_waits_behind_a_stuck_completion_is_judged_by_another_process() -> None:
    async def body(pool: ProcessPool) -> tuple[list[str], float]:
        await asyncio.gather(judged(pool, "ok"), judged(pool, "ok"))
        began = time.monotonic()
        stuck = asyncio.create_task(judged(pool, "sleep 3", "ok", "ok"))
        other = await judged(pool, "ok")
        quick_s = time.monotonic() - began
        return [*statuses(other), *statuses(await stuck)], quick_s

    found, quick_s = with_pool(odd_config(processes=2, max_processes=2, deadline_s=2.0), body)
    assert found == ["scored", "timed_out", "scored", "scored"]
    assert quick_s < 1.0


def test_a_verdict_that_was_not_sent_before_the_process_got_stuck_does_not_wait_for_it() -> None:
    async def body(pool: ProcessPool) -> float:
        await asyncio.gather(judged(pool, "ok"), judged(pool, "ok"))
        began = time.monotonic()
        waiting = [
            asyncio.create_task(judged(pool, text)) for text in ("sleep 0.2", "sleep 0.2", "ok", "sleep 3")
        ]
        await waiting[2]
        quick_s = time.monotonic() - began
        await asyncio.gather(*waiting)
        return quick_s

    assert with_pool(odd_config(processes=2, max_processes=2, deadline_s=2.0), body) < 1.0


def test_samples_behind_a_stuck_one_get_their_verdicts_once_and_in_order() -> None:
    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        return await judged(pool, "ok", "sleep 1.2", *("ok", "raise kaput") * 8)

    found = statuses(with_pool(odd_config(processes=3, deadline_s=4.0, shed_after=0.02), body))
    assert found == ["scored", "scored", *("scored", "failed") * 8]


def test_the_pool_grows_while_all_processes_are_stuck_and_shrinks_again() -> None:
    async def body(pool: ProcessPool) -> tuple[float, int, int]:
        stuck = [asyncio.create_task(judged(pool, "sleep 3")) for _ in range(2)]
        await asyncio.sleep(0.3)
        began = time.monotonic()
        await judged(pool, "ok")
        quick_s, grown = time.monotonic() - began, pool.stats().processes
        await asyncio.gather(*stuck)
        for _ in range(100):
            await asyncio.sleep(0.1)
            if pool.stats().processes == 1:
                break
        return quick_s, grown, pool.stats().processes

    config = odd_config(max_processes=3, deadline_s=4.0, queue_age_s=0.2, idle_s=0.5, batch_samples=1)
    quick_s, grown, left = with_pool(config, body)
    assert quick_s < 2.5, "long before a stuck one ends"
    assert grown == 3, "two are stuck"
    assert left == 1


@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        (LOAD, 2),  # 100 x 10 ms within 0.5 s
        (Load(waiting_samples=100, age_s=0.4, stuck=0, busy=1, service_s=0.01), 1),  # a burst, in time
        (Load(waiting_samples=0, age_s=0.0, stuck=1, busy=1, service_s=0.01), 2),  # one that is not stuck
        (Load(waiting_samples=1, age_s=0.6, stuck=0, busy=1, service_s=0.01), 2),
        (Load(waiting_samples=1, age_s=0.6, stuck=2, busy=2, service_s=0.01), 3),
        (Load(waiting_samples=10_000, age_s=9.0, stuck=0, busy=4, service_s=0.1), 6),  # the upper bound
    ],
)
def test_a_pool_is_as_large_as_its_old_queue_needs(load: Load, wanted: int) -> None:
    assert wanted_processes(load, lowest=1, highest=6, age_s=0.5) == wanted


def test_equal_completions_of_a_deterministic_verifier_are_judged_once(tmp_path: Path) -> None:
    async def body(pool: ProcessPool) -> tuple[tuple[Verdict, ...], tuple[Verdict, ...], int]:
        first = await judged(pool, "5", "6", "5", verifier="exact", answer="5")
        again = await judged(pool, "5", "5", "6", verifier="exact", answer="5")
        other = await judged(pool, "5", verifier="exact", answer="6")
        assert other[0].reward == 0.0, "another task"
        return first, again, pool.stats().cache_hits

    first, again, hits = with_pool(odd_config(warm=["exact"]), body)
    assert [v.reward for v in first] == [1.0, 0.0, 1.0]
    assert [v.reward for v in again] == [1.0, 1.0, 0.0]
    assert hits == 3
    assert all(v.wall_s == 0.0 for v in again)


@pytest.mark.parametrize("changes", [{"cache_entries": 0}, {"verifier": "odd"}])
def test_without_a_cache_or_for_other_verifiers_every_completion_is_judged(
    changes: dict[str, object],
) -> None:
    verifier = str(changes.pop("verifier", "exact"))

    async def body(pool: ProcessPool) -> int:
        for _ in range(2):
            await judged(pool, "ok", "ok", verifier=verifier, answer="ok")
        return pool.stats().cache_hits

    assert with_pool(odd_config(warm=[verifier], **changes), body) == 0


def test_a_cache_keeps_the_latest_scored_verdicts_only() -> None:
    cache = VerdictCache(2)
    verdict = scored((("accuracy", 1.0),), {"accuracy": 1.0}, 0.1, "exact/1")
    cache.put(b"failed", unscored(VerdictStatus.FAILED, 0.1, "broke", "exact/1"))
    for key in (b"a", b"b"):
        cache.put(key, verdict)
    assert cache.get(b"a") is verdict
    cache.put(b"c", verdict)
    assert [cache.get(key) is not None for key in (b"failed", b"a", b"b", b"c")] == [False, True, False, True]


def test_cache_keys_tell_tasks_texts_and_cut_offs_apart() -> None:
    task = task_key("exact", {"answer": "5", "unit": "m"})
    assert task == task_key("exact", {"unit": "m", "answer": "5"})
    keys = [
        sample_key(task, "5", True),
        sample_key(task, "5", False),
        sample_key(task, "5\ud800", True),
        sample_key(task_key("exact", {"answer": "6"}), "5", True),
        sample_key(task_key("math", {"answer": "5", "unit": "m"}), "5", True),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(("pin", "starts"), [("1", True), ("2", False), ("", False)])
def test_a_verifier_of_another_version_than_its_pin_does_not_start(pin: str, starts: bool) -> None:
    config = odd_config(pins={"exact": pin}, warm=["exact"])
    if starts:
        (verdict,) = with_pool(config, lambda pool: judged(pool, "5", verifier="exact", answer="5"))
        assert verdict.reward == 1.0
        return
    with pytest.raises(VerifierError, match=rf"verify.pins.exact='{pin}', but this machine has 'exact/1'"):
        with_pool(config, lambda pool: judged(pool, "5", verifier="exact", answer="5"))


def test_form_parts_are_judged_where_they_are_listed_and_weigh_what_they_are_given() -> None:
    parts = {"accuracy": 1.0, "language": 0.5, "repetition": -1.0, "reflection": 0.0}
    config = odd_config(parts=parts, options={"language": {"target": "en"}})
    text = "<think>wait, seven and 五</think><answer>12</answer>"
    (verdict,) = with_pool(config, lambda pool: judged(pool, text, verifier="exact", answer="12"))
    found = dict(verdict.parts)
    assert list(found) == ["accuracy", "language", "repetition", "reflection"]
    assert found["accuracy"] == 1.0
    assert found["language"] == 0.75
    assert found["repetition"] == 0.0
    assert found["reflection"] > 0
    assert verdict.reward == 1.0 + 0.5 * 0.75


def test_a_form_part_that_is_not_listed_costs_nothing() -> None:
    (verdict,) = with_pool(odd_config(), lambda pool: judged(pool, "5", verifier="exact", answer="5"))
    assert [name for name, _ in verdict.parts] == ["accuracy"]
    assert "language" not in verdict.verifier


@pytest.mark.parametrize("changes", [{}, {"limits": {"code": VerifierLimits(processes=1)}}])
def test_verifiers_that_compile_or_ask_somebody_have_longer_deadlines(changes: dict[str, object]) -> None:
    assert VerifyConfig(**changes).deadlines_s() == {"code": 30.0, "judge": 30.0}  # type: ignore[arg-type]
    given = VerifyConfig(limits={"code": VerifierLimits(deadline_s=5.0)})
    assert given.deadlines_s()["code"] == 5.0
