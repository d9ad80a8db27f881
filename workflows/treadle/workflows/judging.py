"""The verifier pool without a run: `treadle verify` judges the completions of a file, `treadle rescore` judges those
that a run has kept once more. No Ray is needed: the processes are children of this one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from treadle.actors.verify.asked import JudgeRequest
from treadle.actors.verify.config import VerifyConfig
from treadle.actors.verify.pool import ProcessPool
from treadle.actors.verify.verdicts import VerifyStats
from treadle.platform.config import load
from treadle.platform.errors import DataError
from treadle.platform.records import Json, StopReason, Verdict
from treadle.platform.tracking.rollouts import ROLLOUTS_FOLDER, KeptRollout, read_rollouts
from treadle.workflows.data.rows import Row, payload_field, read_rows, text_field

COMPLETION = "completion"


@dataclass(frozen=True, kw_only=True)
class JudgingConfig:
    """The settings of a pool that stands alone; the same keys as in a recipe."""

    verify: VerifyConfig = field(default_factory=VerifyConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A completion to judge. `where` names it to the user: `file:line`, or group and sample."""

    where: str
    verifier: str
    payload: Mapping[str, Json]
    completion: str
    finished: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A verdict with what it is about."""

    asked: Asked
    verdict: Verdict


def judging_config(base: VerifyConfig | None, overrides: Sequence[str], names: set[str]) -> VerifyConfig:
    """`base` with `verify.…=value` settings, warm for these verifiers. Raises `ConfigError`, also for an unknown
    verifier."""
    source = {"verify": _plain(base)} if base is not None else {}
    config = load(JudgingConfig, source, overrides).verify
    for name in sorted(names):
        config.check_verifier(name, "--verifier")
    return replace(config, warm=sorted({*config.warm, *names}))


def _plain(config: VerifyConfig) -> dict[str, object]:
    from treadle.platform.config.schema import as_tree

    tree: dict[str, object] = as_tree(config)
    return tree


def completions_of(url: str, verifier: str, *, skip_bad: bool) -> tuple[list[Asked], int]:
    """The rows of a file: a text `completion`, an `answer` or a `payload`, optional `verifier` (instead of the given
    one) and `finished` (false where the completion was cut off); and how many broken ones were left out. Raises
    `DataError` naming file and line."""

    def parse(row: Row, where: str) -> Asked:
        if not isinstance(row.get(COMPLETION), str):
            found = "is missing" if COMPLETION not in row else "is no text"
            raise DataError(f'{where}: the field "{COMPLETION}" {found}.', "Give what is to be judged.")
        named = text_field(row, "verifier", where) if "verifier" in row else verifier
        if not named:
            raise DataError(
                f'{where}: neither the field "verifier" nor --verifier names one.', "Give one of them."
            )
        if not isinstance(row.get("finished", True), bool):
            raise DataError(f'{where}: the field "finished" must be true or false.', "Leave it out for true.")
        return Asked(
            where=where,
            verifier=named,
            payload=payload_field(row, where),
            completion=row[COMPLETION],
            finished=row.get("finished", True),
        )

    rows = read_rows(url, parse, skip_bad=skip_bad)
    return rows.items, rows.skipped


def kept_rollouts(run: Path) -> list[KeptRollout]:
    """All kept completions of a run, by stage and step. Raises `DataError` where there are none, or they were kept
    without what judging needs."""
    kept = [row for file in sorted((run / ROLLOUTS_FOLDER).glob("*.parquet")) for row in read_rollouts(file)]
    if not kept:
        raise DataError(
            f"{run} has kept no completions.", "Run with tracking.rollouts_every=1 (or more) to keep some."
        )
    if not all(k.row.payload for k in kept):
        raise DataError(
            f"{run} was made by a version that kept completions without their tasks.",
            "Run it again to rescore it.",
        )
    return kept


def asked_of(kept: KeptRollout, verifier: str) -> Asked:
    """A kept completion as a question, to its own verifier or another one."""
    row = kept.row
    return Asked(
        where=f"{row.group_id} sample {row.sample_index}",
        verifier=verifier or row.verifier_name,
        payload=json.loads(row.payload),
        completion=row.completion,
        finished=row.stop != StopReason.LENGTH,
    )


async def judge_all(
    config: VerifyConfig, asked: Sequence[Asked], on_done: Callable[[int], None]
) -> tuple[list[Judged], VerifyStats]:
    """Verdicts in order, and the pool's figures. `on_done` is told how many are judged. Raises `VerifierError` when the
    pool cannot start."""
    pool = ProcessPool(config)
    await pool.start()
    found: dict[int, Judged] = {}
    upcoming: Iterator[tuple[int, Asked]] = iter(enumerate(asked))

    async def serve() -> None:
        for index, question in upcoming:
            (verdict,) = await pool.judge(_request(question), (question.completion,))
            found[index] = Judged(asked=question, verdict=verdict)
            on_done(len(found))

    try:
        # As many callers as fill every process's batch: more would only wait in memory.
        callers = min(len(asked), 2 * config.batch_samples * config.most_processes)
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(serve())
        stats = pool.stats()
    finally:
        await pool.close()
    return [found[index] for index in range(len(asked))], stats


def _request(asked: Asked) -> JudgeRequest:
    return JudgeRequest(
        group_id=asked.where,
        prompt_id=asked.where,
        verifier=asked.verifier,
        payload=asked.payload,
        finished=(asked.finished,),
    )
