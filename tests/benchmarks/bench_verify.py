"""Verdicts per second of processor time: the pool against math-verify called in this process; and what hostile answers
cost honest ones.

    python -m tests.benchmarks.bench_verify [--quick] [--out bench.json]

Both sides judge the same completions (groups of eight per prompt: integers, fractions, expressions, sets; about two in
five wrong), in turns. What counts is the processor time of all processes per verdict, because the pool's process works
beside this one. The second part sends single completions at a steady rate, first honest ones, then with one in ten
that keeps the parser busy until its deadline, and compares how long the honest ones wait.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import math_verify
import numpy as np
import psutil
from tests.benchmarks.bench_rows import Row, append_rows, compared, spread, table

from treadle.actors.verify.asked import JudgeRequest
from treadle.actors.verify.config import VerifyConfig
from treadle.actors.verify.pool import ProcessPool

COMMAND = "python -m tests.benchmarks.bench_verify"
GROUP = 8
DEADLINE_S = 1.0
PER_SECOND = 4.0
HOSTILE_SHARE = 0.1
PROCESSES = (2, 8)
"""The default, which grows to as many; and as many from the start."""
ENDLESS = ("5^{5^{5^{5^{5}}}}", "\\sin(10^{10^{10}})", "2^{-9^{9^{9}}}", "\\sqrt{7^{7^{7^{7}}}}")
THINKING = (
    "Let us count the ways first. There are $n$ of them for the first place, and $n-1$ for the second. Wait, that "
    "counts every pair twice, so we divide by two. With $n = 12$ this gives $\\frac{12 \\cdot 11}{2} = 66$. "
) * 4


@dataclass(frozen=True)
class Task:
    """One prompt's expected answer and its completions."""

    gold: str
    texts: tuple[str, ...]


def completion(answer: str) -> str:
    """About a kilobyte, as a policy writes it."""
    return f"<think>{THINKING}</think>\n<answer>The answer is $\\boxed{{{answer}}}$.</answer>"


def expression(kind: int, rng: random.Random) -> tuple[str, str, str]:
    """Expected, equal and different. Numbers are drawn, because prompts of a data set differ: sympy remembers what it
    has simplified, and a handful of expressions would be looked up from the second time on."""
    a, b = rng.sample(range(2, 99), 2)
    low, high = sorted((a, b))
    return (
        (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}", f"{a + 1}\\sqrt{{{b}}}"),
        (
            f"\\frac{{x+{a}}}{{{b}}}",
            f"\\frac{{x}}{{{b}}}+\\frac{{{a}}}{{{b}}}",
            f"\\frac{{x+{a + 1}}}{{{b}}}",
        ),
        (f"x^2+{2 * a}x+{a * a}", f"(x+{a})^2", f"(x-{a})^2"),
        (f"\\{{1,{low},{high}\\}}", f"\\{{{high},1,{low}\\}}", f"\\{{1,{low}\\}}"),
        (f"[{low},{high})", f"[{low}, {high})", f"({low},{high})"),
        (f"\\frac{{\\pi}}{{{a}}}", f"\\pi/{a}", f"\\pi/{a + 1}"),
        (f"({a},\\frac{{\\pi}}{{{b}}})", f"\\left({a}, \\frac{{\\pi}}{{{b}}}\\right)", f"({a},\\pi)"),
        (f"x > {a}", f"{a} < x", f"x < {a}"),
    )[kind % 8]


def tasks(n: int, rng: random.Random) -> list[Task]:
    """Half integers, a quarter fractions and decimals, a quarter expressions; three in five completions right."""
    made = []
    for index in range(n):
        number = rng.randint(-999, 9999)
        gold, right, wrong = (
            (str(number), str(number), str(number + 1)),
            (str(number), f"{number}.0", str(-number - 1)),
            (f"\\frac{{{number}}}{{7}}", f"{number}/7", f"\\frac{{7}}{{{abs(number) + 1}}}"),
            expression(index // 4, rng),
        )[index % 4]
        texts = tuple(completion(right if rng.random() < 0.6 else wrong) for _ in range(GROUP))
        made.append(Task(gold, texts))
    return made


def request(gold: str, n: int) -> JudgeRequest:
    return JudgeRequest(
        group_id="g", prompt_id="p", verifier="math", payload={"answer": gold}, finished=(True,) * n
    )


@asynccontextmanager
async def running(**settings: object) -> AsyncIterator[ProcessPool]:
    """A warm pool that remembers nothing."""
    config = VerifyConfig(warm=["math"], parts={"accuracy": 1.0}, cache_entries=0, **settings)  # type: ignore[arg-type]
    pool = ProcessPool(config)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


def spent_s() -> float:
    """Processor time of this process and its verifier processes so far."""
    here = psutil.Process(os.getpid())
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(taken.user + taken.system for taken in times)


async def ours(pool: ProcessPool, work: Sequence[Task]) -> tuple[float, list[bool]]:
    """Verdicts per second of processor time, and the verdicts."""
    began_s = spent_s()
    groups = await asyncio.gather(*(pool.judge(request(t.gold, len(t.texts)), t.texts) for t in work))
    verdicts = [verdict.reward > 0 for group in groups for verdict in group]
    return len(verdicts) / (spent_s() - began_s), verdicts


def theirs(work: Sequence[Task]) -> tuple[float, list[bool]]:
    """The same by math-verify, as its README calls it."""
    began_s = spent_s()
    verdicts = []
    for task in work:
        gold = math_verify.parse(f"${task.gold}$")
        verdicts += [math_verify.verify(gold, math_verify.parse(text)) for text in task.texts]
    return len(verdicts) / (spent_s() - began_s), verdicts


async def throughput(rounds: int, n: int) -> Row:
    """Both sides in turns, the first turn of each left out."""
    rng = random.Random(11)
    our_rates, their_rates = [], []
    async with running(processes=1, max_processes=1, deadline_s=30.0) as pool:
        for _ in range(rounds + 1):
            work = tasks(n, rng)
            rate, mine = await ours(pool, work)
            our_rates.append(rate)
            rate, other = theirs(work)
            their_rates.append(rate)
            assert mine == other, "the two sides judge differently"
    print(f"pool {spread(our_rates[1:])}, math-verify {spread(their_rates[1:])} verdicts per CPU second")
    return compared(
        "verify: verdicts per core, pool against math-verify in-process",
        statistics.median(our_rates[1:]),
        statistics.median(their_rates[1:]),
        "verdicts per second of processor time (ratio above 1: the pool is faster)",
        command=COMMAND,
        detail=f"medians of {rounds} turns of {n} groups of {GROUP}; all processes counted",
    )


async def waits_ms(
    pool: ProcessPool, seconds: float, hostile_share: float, rng: random.Random
) -> list[float]:
    """How long each honest completion waited for its verdict, at a steady rate, hostile ones in between."""
    waits: list[float] = []

    async def ask(index: int, hostile: bool) -> None:
        task = tasks(1 + index % 32, rng)[-1]
        began = time.perf_counter()
        if hostile:
            await pool.judge(request("\\sqrt{2}", 1), (completion(rng.choice(ENDLESS)),))
        else:
            await pool.judge(request(task.gold, 1), task.texts[:1])
            waits.append(1e3 * (time.perf_counter() - began))

    asked = []
    for index in range(int(seconds * PER_SECOND)):
        asked.append(asyncio.create_task(ask(index, rng.random() < hostile_share)))
        await asyncio.sleep(1 / PER_SECOND)
    await asyncio.gather(*asked)
    return waits


async def latency(processes: int, rounds: int, seconds: float) -> Row:
    """Honest completions alone and among hostile ones, in turns, each on a fresh pool of so many processes."""
    rng = random.Random(13)
    found: dict[float, list[float]] = {0.0: [], HOSTILE_SHARE: []}
    for _ in range(rounds):
        for share, waits in found.items():
            async with running(processes=processes, deadline_s=DEADLINE_S) as pool:
                await waits_ms(pool, 2.0, 0.0, rng)
                waits += await waits_ms(pool, seconds, share, rng)
    alone, among = (np.percentile(waits, (50, 95, 99)) for waits in found.values())
    for name, values in (("alone", alone), ("among hostile ones", among)):
        print(
            f"{processes} processes, honest {name}: p50 {values[0]:.1f}, p95 {values[1]:.1f}, p99 {values[2]:.1f} ms"
        )
    return compared(
        f"verify: p99 wait of honest completions, 1 in 10 hostile against none, {processes} processes",
        float(among[2]),
        float(alone[2]),
        "ms (ratio 1: hostile completions cost the others nothing)",
        command=COMMAND,
        detail=f"{PER_SECOND:g} completions per s, deadline {DEADLINE_S:g} s; medians "
        f"{among[0]:.1f} against {alone[0]:.1f} ms, p95 {among[1]:.1f} against {alone[1]:.1f} ms",
    )


async def measured(quick: bool) -> list[Row]:
    rows = [await throughput(1, 24) if quick else await throughput(7, 96)]
    for processes in PROCESSES:
        rows.append(await latency(processes, *((1, 10.0) if quick else (2, 40.0))))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    given = parser.parse_args()
    rows = asyncio.run(measured(given.quick))
    append_rows(given.out, rows)
    print(table([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
