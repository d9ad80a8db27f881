"""The pool of killable processes, with real processes."""

import asyncio
import math
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from tests.actors.verify.pool_helpers import (
    BARE,
    children,
    fork_servers,
    judged,
    odd_config,
    running,
    statuses,
    with_pool,
)

from treadle.actors.verify.config import VerifyConfig
from treadle.actors.verify.pool import ProcessPool
from treadle.platform.errors import VerifierError
from treadle.platform.records import Verdict

pytestmark = pytest.mark.processes


def test_completions_are_scored_in_order_and_parts_sum_to_the_reward() -> None:
    config = VerifyConfig(processes=2, eos="<eos>", batch_samples=3)
    good = "<think>7+5=12</think><answer>132</answer>"
    texts = (good + "<eos>", good, "<answer>132</answer><eos>", "<think>a</think><answer>5</answer>", "132")

    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        return await judged(pool, *texts, verifier="exact", answer="132")

    verdicts = with_pool(config, body)
    assert [verdict.reward for verdict in verdicts] == [1.1, 1.1, 1.0, 0.1, 1.0]
    assert verdicts[0].parts == (("accuracy", 1.0), ("format", 1.0))
    assert re.fullmatch(r"exact/\w+\+format/\w+", verdicts[0].verifier)
    assert all(one.reward == sum(config.parts[name] * value for name, value in one.parts) for one in verdicts)


def test_a_completion_that_was_cut_off_gets_no_format_credit() -> None:
    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        text = "<think>a</think><answer>132</answer>"
        return await judged(pool, text, verifier="exact", finished=False, answer="132")

    (verdict,) = with_pool(VerifyConfig(processes=1), body)
    assert verdict.parts == (("accuracy", 1.0), ("format", 0.0))


def test_an_eos_text_inside_the_completion_is_forged() -> None:
    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        return await judged(
            pool, "<think>a<eos></think><answer>132</answer><eos>", verifier="exact", answer="132"
        )

    (verdict,) = with_pool(VerifyConfig(processes=1, eos="<eos>"), body)
    assert dict(verdict.parts)["format"] == 0.0


@pytest.mark.parametrize("hang", ["sleep 60", "spin", "stop", "children"])
def test_only_the_completion_that_hangs_is_timed_out(hang: str) -> None:
    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        return await judged(pool, "ok", "ok", hang, "ok", "ok")

    verdicts = with_pool(odd_config(), body)
    assert statuses(verdicts) == ["scored", "scored", "timed_out", "scored", "scored"]
    late = verdicts[2]
    assert math.isnan(late.reward)
    assert 1.0 <= late.wall_s < 2.0
    assert late.detail == "odd: no verdict within verify.deadline_s=1.0"


def test_a_hang_is_answered_within_the_deadline_and_a_second() -> None:
    async def body(pool: ProcessPool) -> float:
        await judged(pool, "ok")
        began = time.monotonic()
        assert statuses(await judged(pool, "spin")) == ["timed_out"]
        return time.monotonic() - began

    assert with_pool(odd_config(), body) < 2.0


def test_what_a_hanging_verifier_started_dies_with_it() -> None:
    async def body(pool: ProcessPool) -> list[psutil.Process]:
        waiting = asyncio.create_task(judged(pool, "children"))
        grandchildren: list[psutil.Process] = []
        while not grandchildren:
            await asyncio.sleep(0.02)
            for pid in children():
                grandchildren = psutil.Process(pid).children()
        await waiting
        return grandchildren

    found = with_pool(odd_config(deadline_s=4.0), body)
    _, alive = psutil.wait_procs(found, timeout=2)
    assert alive == []


@pytest.mark.parametrize(
    ("crash", "says"),
    [
        ("exit 3", "status 3"),
        ("segv", "SIGSEGV"),
        ("kill", "SIGKILL"),
        ("raise kaput", "KeyError: 'kaput'"),
        ("hog", "MemoryError"),
        ("nan", "'accuracy' is nan"),
        ("files", "Too many open files"),
        ("nonsense", "do_nonsense"),
    ],
)
def test_a_crash_is_a_failed_verdict_for_that_completion_alone(crash: str, says: str) -> None:
    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        return await judged(pool, "ok", crash, "ok", deadline="the crash must come first")

    verdicts = with_pool(odd_config(memory_bytes=256 * 2**20, deadline_s=20.0), body)
    assert statuses(verdicts) == ["scored", "failed", "scored"]
    assert math.isnan(verdicts[1].reward)
    assert says in verdicts[1].detail
    assert verdicts[1].parts == ()


def test_each_of_several_crashes_in_a_batch_gets_its_own_verdict() -> None:
    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        return await judged(pool, "kill", "ok", "sleep 9", "kill", "exit 1", "ok", "raise x", "kill")

    verdicts = with_pool(odd_config(deadline_s=0.5), body)
    expected = ["failed", "scored", "timed_out", "failed", "failed", "scored", "failed", "failed"]
    assert statuses(verdicts) == expected


def test_what_a_verifier_prints_or_reads_does_not_reach_the_conversation() -> None:
    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        return await judged(pool, "print 10000", "read", "print 3000000", "ok")

    verdicts = with_pool(odd_config(deadline_s=20.0), body)
    assert statuses(verdicts) == ["scored", "scored", "failed", "scored"]
    assert "File too large" in verdicts[2].detail


def test_the_process_inherits_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, "secret")

    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        names = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_TOKEN")
        return await judged(pool, *(f"env {name}" for name in names))

    assert [verdict.reward for verdict in with_pool(odd_config(), body)] == [0.0] * 4


def test_the_process_imports_nothing_heavy() -> None:
    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        await judged(pool, "1", verifier="exact", answer="1")
        await judged(pool, "1", verifier="countdown", numbers=[1], target=1)
        return await judged(pool, "modules numpy,torch,ray,transformers,sympy,omegaconf,asyncio")

    (verdict,) = with_pool(odd_config(), body)
    assert verdict.reward == 0.0


def test_imports_are_not_on_a_completions_clock() -> None:
    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        return await judged(pool, "ok", verifier="slow-to-build")

    assert statuses(with_pool(odd_config(deadline_s=0.5), body)) == ["scored"]


@pytest.mark.parametrize(
    ("verifier", "says"),
    [
        ("unbuildable", "the word list is missing"),
        ("dies-when-built", "status 9"),
        ("unknown-part", "verify.parts.elegance"),
        ("missing", "odd_verifiers:NoSuchName"),
        ("nobody", "no verifier 'nobody'"),
    ],
)
def test_a_verifier_that_cannot_work_fails_its_completions_and_no_others(verifier: str, says: str) -> None:
    async def body(pool: ProcessPool) -> tuple[tuple[Verdict, ...], ...]:
        return await asyncio.gather(judged(pool, "ok", "ok", verifier=verifier), judged(pool, "ok"))

    broken, healthy = with_pool(odd_config(), body)
    assert statuses(broken) == ["failed", "failed"]
    assert says in broken[0].detail
    assert statuses(healthy) == ["scored"]


def test_a_payload_that_cannot_be_sent_fails_alone() -> None:
    async def body(pool: ProcessPool) -> tuple[tuple[Verdict, ...], ...]:
        return await asyncio.gather(
            judged(pool, "ok", answer=10**5000), *(judged(pool, "ok") for _ in range(4))
        )

    first, *others = with_pool(odd_config(), body)
    assert statuses(first) == ["failed"]
    assert "payload" in first[0].detail
    assert all(statuses(other) == ["scored"] for other in others)


def test_a_process_killed_from_outside_in_mid_judgement_costs_only_time() -> None:
    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        await judged(pool, "ok")
        (pid,) = children()
        waiting = asyncio.create_task(judged(pool, "ok", "sleep 0.6", "ok"))
        await asyncio.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        return await waiting

    verdicts = with_pool(odd_config(deadline_s=5.0), body)
    assert statuses(verdicts) == ["scored", "scored", "scored"]


def test_a_process_killed_between_batches_costs_nothing() -> None:
    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        await judged(pool, "ok")
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        return await judged(pool, "ok", "ok")

    assert statuses(with_pool(odd_config(), body)) == ["scored", "scored"]


def test_a_process_stopped_between_batches_costs_only_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.actors.verify.process.PICKUP_S", 0.5)

    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        await judged(pool, "ok")
        for pid in children():
            os.kill(pid, signal.SIGSTOP)
        return await judged(pool, "ok", "x" * 3_000_000, "ok")

    assert statuses(with_pool(odd_config(), body)) == ["scored", "failed", "scored"]


def test_a_fork_server_killed_in_mid_judgement_takes_its_processes_along_and_is_replaced() -> None:
    async def body(pool: ProcessPool) -> tuple[tuple[Verdict, ...], list[int], list[int]]:
        await judged(pool, "ok")
        waiting = asyncio.create_task(judged(pool, "ok", "sleep 0.6", "ok"))
        await asyncio.sleep(0.3)
        before = fork_servers()
        os.kill(before[0], signal.SIGKILL)
        return await waiting, before, fork_servers()

    verdicts, before, after = with_pool(odd_config(deadline_s=5.0), body)
    assert statuses(verdicts) == ["scored", "scored", "scored"]
    assert len(before) == len(after) == 1
    assert before != after


def test_a_fork_server_that_hangs_is_replaced_within_the_startup_deadline() -> None:
    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        await judged(pool, "ok")
        os.kill(fork_servers()[0], signal.SIGSTOP)
        os.kill(children()[0], signal.SIGKILL)
        return await judged(pool, "ok", "ok")

    assert statuses(with_pool(odd_config(startup_deadline_s=1.0), body)) == ["scored", "scored"]


def test_a_process_that_replaces_another_has_its_verifier_built() -> None:
    async def body(pool: ProcessPool) -> list[tuple[Verdict, ...]]:
        found = []
        for _ in range(2):
            found.append(await judged(pool, "\\boxed{2}", verifier="math", answer="2"))
            (pid,) = children()
            cpu = psutil.Process(pid).cpu_times()
            assert cpu.user + cpu.system < 0.5, "sympy alone takes a second"
            os.kill(pid, signal.SIGKILL)
        return found

    for (verdict,) in with_pool(odd_config(warm=["math"], cache_entries=0), body):
        assert verdict.reward == 1.0


def test_a_sample_whose_process_is_killed_is_judged_once_more(tmp_path: Path) -> None:
    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        return await judged(pool, "ok", f"once {tmp_path / 'mark'}", "ok")

    assert statuses(with_pool(odd_config(), body)) == ["scored"] * 3


def test_a_sample_that_kills_every_process_is_judged_twice_and_then_to_blame() -> None:
    async def body(pool: ProcessPool) -> tuple[tuple[Verdict, ...], int]:
        await judged(pool, "ok")
        return await judged(pool, "ok", "kill", "ok"), pool.restarts

    verdicts, restarts = with_pool(odd_config(), body)
    assert statuses(verdicts) == ["scored", "failed", "scored"]
    assert restarts == 2


def test_a_full_queue_makes_callers_wait_and_loses_nothing() -> None:
    async def body(pool: ProcessPool) -> list[tuple[Verdict, ...]]:
        return await asyncio.gather(*(judged(pool, "ok", "sleep 0.01", "ok") for _ in range(30)))

    for verdicts in with_pool(odd_config(queue_batches=2, processes=2, batch_samples=4), body):
        assert statuses(verdicts) == ["scored"] * 3


def test_a_caller_that_goes_away_leaves_the_pool_working() -> None:
    async def body(pool: ProcessPool) -> tuple[Verdict, ...]:
        tasks = [asyncio.create_task(judged(pool, "sleep 0.2")) for _ in range(5)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        began = time.monotonic()
        verdicts = await judged(pool, "ok")
        assert time.monotonic() - began < 0.9  # the cancelled ones behind the first were not judged
        return verdicts

    assert statuses(with_pool(odd_config(batch_samples=1), body)) == ["scored"]


def test_closing_tells_everyone_who_waits() -> None:
    async def main() -> list[object]:
        async with running(odd_config(queue_batches=1, batch_samples=1)) as pool:
            waiting = [asyncio.create_task(judged(pool, "sleep 0.9", verifier="odd")) for _ in range(5)]
            await asyncio.sleep(0.1)
            await pool.close()
            async with asyncio.timeout(5):
                return list(await asyncio.gather(*waiting, return_exceptions=True))

    answers = asyncio.run(main())
    assert len(answers) == 5
    assert all(isinstance(answer, VerifierError) for answer in answers)


def test_a_pool_that_cannot_start_says_why_and_leaves_nothing() -> None:
    async def main() -> None:
        await ProcessPool(odd_config(warm=["unbuildable"], processes=2)).start()

    with pytest.raises(VerifierError, match="the word list is missing"):
        asyncio.run(main())
    assert children() == []


def test_a_pool_that_never_started_refuses() -> None:
    async def main() -> None:
        await judged(ProcessPool(odd_config()), "ok")

    with pytest.raises(VerifierError, match="not running"):
        asyncio.run(main())


def test_statistics_count_by_status() -> None:
    async def body(pool: ProcessPool) -> None:
        await judged(pool, "ok", "ok", "raise x", "sleep 9")
        stats = pool.stats()
        assert (stats.scored, stats.failed, stats.timed_out) == (2, 1, 1)
        assert stats.p50_s < 0.1 < 0.5 <= stats.p99_s
        await judged(pool, "ok")
        assert pool.restarts == 1

    with_pool(odd_config(deadline_s=0.5), body)


def test_the_processes_die_with_the_program_that_started_them(tmp_path: Path) -> None:
    """The parent is killed with a completion at work; the process must not outlive it."""
    import subprocess
    import sys

    program = tmp_path / "program.py"
    program.write_text(
        "import asyncio, sys\n"
        "from tests.actors.verify.pool_helpers import children, judged, odd_config\n"
        "from treadle.actors.verify.pool import ProcessPool\n"
        "async def main():\n"
        "    pool = ProcessPool(odd_config(deadline_s=60.0))\n"
        "    await pool.start()\n"
        "    print(*children(), flush=True)\n"
        "    await judged(pool, 'sleep 60')\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        parent.kill()
    _, alive = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=3)
    assert alive == []


def test_a_process_that_checks_strings_starts_fast() -> None:
    """The bound is ten times what it takes on a quiet machine."""

    async def main() -> float:
        began = time.monotonic()
        async with running(VerifyConfig(processes=1, parts=BARE, warm=["exact"])):
            return time.monotonic() - began

    assert min(asyncio.run(main()) for _ in range(3)) < 1.5
