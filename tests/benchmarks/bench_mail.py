"""The price of a small question to an actor: together with others (`actors/mail.py`) against a call of its own.

    python -m tests.benchmarks.bench_mail [--quick] [--out bench.json]

Both sides ask one Ray actor the same: 12 questions of a small group's size at one moment, as a demo step does of each
rollout worker. They take turns in one process; what counts is the processor time of both processes per question.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from tests.benchmarks.bench_rows import Row, append_rows, compared, spread, table

from treadle.actors.mail import Courier, Letter, Mailbox, Reply

QUESTIONS = 12
QUESTION, ANSWER = b"?" * 300, b"!" * 3000
"""About what an issue and a group of eight short samples come to."""
COMMAND = "python -m tests.benchmarks.bench_mail"


@ray.remote(max_concurrency=1000)
class Answerer:
    """Answers at once, by mail or by call."""

    def __init__(self) -> None:
        self._mail = Mailbox("bench/ask", self.ask, 0.02)

    async def ask(self, question: bytes) -> bytes:
        return ANSWER if question else b""

    async def post(self, letters: Sequence[Letter[bytes]]) -> None:
        self._mail.post(letters)

    async def fetch(self) -> list[Reply[bytes]]:
        return await self._mail.fetch()

    async def spent_s(self) -> float:
        return time.process_time()


async def turn(actor: Any, ask: Callable[[bytes], Awaitable[bytes]], steps: int) -> float:
    """Milliseconds of processor time, both processes together, per question."""
    theirs, ours = await actor.spent_s.remote(), time.process_time()
    for _ in range(steps):
        answers = await asyncio.gather(*(ask(QUESTION) for _ in range(QUESTIONS)))
        assert answers == [ANSWER] * QUESTIONS
    spent_s = await actor.spent_s.remote() - theirs + time.process_time() - ours
    return 1e3 * spent_s / (steps * QUESTIONS)


async def measured(rounds: int, steps: int) -> Row:
    """Both sides in turns, the first turn of each left out."""
    untyped: Any = Answerer  # what ray.remote returns is untyped
    actor = untyped.remote()

    async def post(letters: Sequence[Letter[bytes]]) -> None:
        await actor.post.remote(letters)

    async def fetch() -> list[Reply[bytes]]:
        replies: list[Reply[bytes]] = await actor.fetch.remote()
        return replies

    async def call(question: bytes) -> bytes:
        answer: bytes = await actor.ask.remote(question)
        return answer

    courier: Courier[bytes, bytes] = Courier(post, fetch)
    mailed, called = [], []
    for _ in range(rounds + 1):
        mailed.append(await turn(actor, courier.ask, steps))
        called.append(await turn(actor, call, steps))
    print(f"by mail {spread(mailed[1:])}, by call {spread(called[1:])} ms of processor time per question")
    return compared(
        f"mail: {QUESTIONS} questions of one moment to one actor",
        statistics.median(mailed[1:]),
        statistics.median(called[1:]),
        "ms of processor time per question (ratio below 1: mail is cheaper)",
        command=COMMAND,
        detail=f"medians of {rounds} turns of {steps} steps",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    given = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="tb", dir="/tmp")
    try:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        row = asyncio.run(measured(1, 20) if given.quick else measured(9, 100))
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    append_rows(given.out, [row])
    print(table([asdict(row)]))


if __name__ == "__main__":
    main()
