"""`treadle verify` and `treadle rescore`: results as JSON, or as a table."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from treadle.actors.verify.verdicts import VerifyStats
from treadle.platform.errors import Interrupted
from treadle.platform.records import VerdictStatus
from treadle.platform.tracking.console import duration
from treadle.platform.tracking.rollouts import KeptRollout
from treadle.workflows.folder import RunFolder
from treadle.workflows.judging import (
    Asked,
    Judged,
    asked_of,
    completions_of,
    judge_all,
    judging_config,
    kept_rollouts,
)
from treadle.workflows.texts import table

Result = dict[str, Any]
SHOWN_ROWS = 20
_TELL_EVERY_S = 2.0
VERIFIER_BROKE = 1
"""Exit code when a verdict is `failed`: the verifier or its data is at fault, not the completion."""


def verify(
    url: str, verifier: str, overrides: Sequence[str], out: Path | None, rows: int, *, skip_bad: bool
) -> Result:
    """Judges a file's completions."""
    asked, skipped = completions_of(url, verifier, skip_bad=skip_bad)
    config = judging_config(None, overrides, {one.verifier for one in asked})
    judged, stats, wall_s = _judged(config, asked)
    if out is not None:
        _write_lines(out, [_record(one) for one in judged])
    summary = _summary(judged, stats, wall_s) | {"file": url, "skipped_rows": skipped}
    lines = table(
        ["where", "status", "reward", "parts", "ms", "detail"], [_cells(one) for one in judged[:rows]]
    )
    if len(judged) > rows:
        lines.append(f"… and {len(judged) - rows} more" + ("" if out else " (--out FILE keeps them all)"))
    text = "\n".join([*lines, "", _summary_line(summary), *([f"{out}"] if out else [])])
    return {**summary, "text": text, "exit_code": VERIFIER_BROKE if summary["failed"] else 0}


def rescore(run: Path, verifier: str, overrides: Sequence[str], out: Path | None, rows: int) -> Result:
    """Judges a run's kept completions again and says whose reward changed."""
    from treadle.workflows.data.tokenization import load_tokenizer
    from treadle.workflows.recipe import load_recipe

    folder = RunFolder.existing(run)
    recipe = load_recipe(folder.config)
    kept = kept_rollouts(folder.path)
    asked = [asked_of(one, verifier) for one in kept]
    # As the run did: completions end with the text of the tokenizer's EOS.
    eos = recipe.verify.eos or str(load_tokenizer(str(folder.tokenizer)).eos_token)
    config = judging_config(replace(recipe.verify, eos=eos), overrides, {one.verifier for one in asked})
    judged, stats, wall_s = _judged(config, asked)
    changed = [(old, new) for old, new in zip(kept, judged, strict=True) if _differs(old, new)]
    if out is not None:
        _write_lines(out, [_change(old, new) for old, new in changed])
    summary = _summary(judged, stats, wall_s) | {
        "run": str(run),
        "changed": len(changed),
        "reward_mean_before": _mean([one.row.reward for one in kept]),
    }
    header = ["where", "step", "before", "after", "parts before", "parts after", "detail"]
    lines = table(header, [_change_cells(old, new) for old, new in changed[:rows]]) if changed else []
    if len(changed) > rows:
        lines.append(f"… and {len(changed) - rows} more" + ("" if out else " (--out FILE keeps them all)"))
    line = (
        f"{len(changed)} of {len(judged)} rewards changed; mean {_figure(summary['reward_mean_before'])} → "
        f"{_figure(summary['reward_mean'])}"
    )
    text = "\n".join([*lines, *([""] if lines else []), line, _summary_line(summary)])
    return {**summary, "text": text, "exit_code": VERIFIER_BROKE if summary["failed"] else 0}


def _judged(config: Any, asked: Sequence[Asked]) -> tuple[list[Judged], VerifyStats, float]:
    began_s = time.monotonic()
    try:
        judged, stats = asyncio.run(judge_all(config, asked, _progress(len(asked))))
    except KeyboardInterrupt:
        raise Interrupted("Stopped by the operator: nothing was written.") from None
    return judged, stats, time.monotonic() - began_s


def _progress(total: int) -> Callable[[int], None]:
    """Says on standard error how far it is and how long it takes, every other second."""
    began_s = told_s = time.monotonic()

    def tell(done: int) -> None:
        nonlocal began_s, told_s
        now_s = time.monotonic()
        if done == 1:  # what went before was the processes' start
            began_s = told_s = now_s
        if now_s - told_s < _TELL_EVERY_S:
            return
        told_s = now_s
        left_s = (now_s - began_s) / (done - 1) * (total - done)
        sys.stderr.write(f"judged {done}/{total}  ETA {duration(left_s)}\n")
        sys.stderr.flush()

    return tell


def _summary(judged: Sequence[Judged], stats: VerifyStats, wall_s: float) -> Result:
    counts = Counter(str(one.verdict.status) for one in judged)
    scored = [one.verdict for one in judged if one.verdict.status is VerdictStatus.SCORED]
    parts: dict[str, list[float]] = {}
    for verdict in scored:
        for name, value in verdict.parts:
            parts.setdefault(name, []).append(value)
    return {
        "judged": len(judged),
        **{str(status): counts[str(status)] for status in VerdictStatus},
        "reward_mean": _mean([verdict.reward for verdict in scored]),
        "parts_mean": {name: fmean(values) for name, values in parts.items()},
        "verifiers": dict(Counter(one.verdict.verifier for one in judged)),
        "wall_s": wall_s,
        "per_s": len(judged) / max(wall_s, 1e-9),
        "p50_s": stats.p50_s,
        "p95_s": stats.p95_s,
        "p99_s": stats.p99_s,
        "cache_hits": stats.cache_hits,
        "restarts": stats.restarts,
    }


def _summary_line(summary: Result) -> str:
    parts = ", ".join(f"{name} {value:.3f}" for name, value in summary["parts_mean"].items())
    return (
        f"{summary['judged']} judged in {duration(summary['wall_s'])}: {summary['scored']} scored (mean reward "
        f"{_figure(summary['reward_mean'])}{'; ' + parts if parts else ''}), {summary['failed']} failed, "
        f"{summary['timed_out']} timed out; p50 {1e3 * summary['p50_s']:.1f} ms, p99 {1e3 * summary['p99_s']:.1f} ms"
    )


def _record(judged: Judged) -> Result:
    verdict = judged.verdict
    return {
        "where": judged.asked.where,
        "status": str(verdict.status),
        "reward": _jsonable(verdict.reward),
        "parts": dict(verdict.parts),
        "wall_s": verdict.wall_s,
        "detail": verdict.detail,
        "verifier": verdict.verifier,
    }


def _change(old: KeptRollout, new: Judged) -> Result:
    before = {
        "status": old.row.status,
        "reward": _jsonable(old.row.reward),
        "parts": old.row.parts,
        "verifier": old.row.verifier,
    }
    return {
        **_record(new),
        "stage": old.stage,
        "step": old.step,
        "prompt_id": old.row.prompt_id,
        "before": before,
    }


def _differs(old: KeptRollout, new: Judged) -> bool:
    if old.row.status != str(new.verdict.status):
        return True
    return new.verdict.status is VerdictStatus.SCORED and not math.isclose(
        old.row.reward, new.verdict.reward, abs_tol=1e-9
    )


def _cells(judged: Judged) -> list[str]:
    verdict = judged.verdict
    where = judged.asked.where.rsplit("/", 1)[-1]
    return [
        where,
        str(verdict.status),
        _figure(verdict.reward),
        _parts(dict(verdict.parts)),
        f"{1e3 * verdict.wall_s:.1f}",
        verdict.detail[:80],
    ]


def _change_cells(old: KeptRollout, new: Judged) -> list[str]:
    return [
        new.asked.where,
        str(old.step),
        _figure(old.row.reward) if old.row.status == VerdictStatus.SCORED else old.row.status,
        _figure(new.verdict.reward)
        if new.verdict.status is VerdictStatus.SCORED
        else str(new.verdict.status),
        _parts(old.row.parts),
        _parts(dict(new.verdict.parts)),
        new.verdict.detail[:60],
    ]


def _parts(parts: dict[str, float]) -> str:
    return " ".join(f"{name}={value:g}" for name, value in parts.items())


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _mean(values: Sequence[float]) -> float:
    """Of the scored ones; NaN where there is none."""
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def _jsonable(value: float) -> float | None:
    return None if math.isnan(value) else value


def _write_lines(path: Path, records: Sequence[Result]) -> None:
    """JSON lines, complete or not at all."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    draft.replace(path)
