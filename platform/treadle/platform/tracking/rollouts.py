"""Sampled rollouts as Parquet, `rollouts/<stage>-<step>.parquet` (pandas, DuckDB, the report)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

from treadle.platform.records import Drawn, Verdict

ROLLOUTS_FOLDER = "rollouts"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRow:
    """One judged completion. `reward` is NaN unless `status` is `scored`.

    Example: `RolloutRow(group_id="grpo/17", prompt_id="addition-47+85", prompt="47+85=", sample_index=3,
    completion="<think>…</think><answer>132</answer>", thinking="…", answer="132", reward=1.1,
    parts={"accuracy": 1.0, "format": 1.0}, status="scored", detail="", verifier="exact/1", version_oldest=16,
    version_newest=16, length_tokens=21, stop="eos", worker="rollout-0", generate_s=0.2, verify_s=0.002)`.
    """

    group_id: str
    prompt_id: str
    prompt: str
    sample_index: int
    completion: str
    thinking: str
    answer: str
    reward: float
    parts: dict[str, float]
    status: str
    detail: str
    verifier: str
    version_oldest: int  # optimizer steps behind the weights of the first token
    version_newest: int
    length_tokens: int
    stop: str
    worker: str
    generate_s: float  # of the whole group
    verify_s: float
    verifier_name: str = ""  # as the prompt names it; with `payload`, what is needed to judge again
    payload: str = ""  # JSON


def split_completion(text: str) -> tuple[str, str]:
    """(thinking, answer): what stands before the first `</think>`, and behind it in the last
    `<answer>…</answer>`. The opening tag may stand in the prompt; a thinking block that never ends goes to
    the end of the text; without an answer block the answer is what follows the thinking. Linear in the text.

    Example: `"<think>4+5=9</think><answer>9</answer>"` gives `("4+5=9", "9")`.
    """
    thinking, closed, tail = text.partition("</think>")
    if closed:  # the opening tag may stand in the prompt
        thinking = thinking.rpartition("<think>")[2]
    else:
        tail, _, thinking = text.partition("<think>")
    _, found, last = tail.rpartition("<answer>")
    answer = last.partition("</answer>")[0] if found else tail
    return thinking.strip(), answer.strip()


def rollout_rows(drawn: Drawn, texts: Sequence[str], verdicts: Sequence[Verdict]) -> list[RolloutRow]:
    """The rows of one group. `texts` are the completions in sample order (what `drawn.texts` refers to)."""
    rows = []
    payload = json.dumps(dict(drawn.prompt.payload), ensure_ascii=False)
    for index, (text, verdict) in enumerate(zip(texts, verdicts, strict=True)):
        thinking, answer = split_completion(text)
        rows.append(
            RolloutRow(
                group_id=drawn.id,
                prompt_id=drawn.prompt.id,
                prompt=drawn.prompt.text,
                sample_index=index,
                completion=text,
                thinking=thinking,
                answer=answer,
                reward=verdict.reward,
                parts=dict(verdict.parts),
                status=str(verdict.status),
                detail=verdict.detail,
                verifier=verdict.verifier,
                version_oldest=drawn.oldest.step,
                version_newest=drawn.newest.step,
                length_tokens=drawn.lengths[index],
                stop=str(drawn.stops[index]),
                worker=drawn.worker,
                generate_s=drawn.wall_s,
                verify_s=verdict.wall_s,
                verifier_name=drawn.prompt.verifier,
                payload=payload,
            )
        )
    return rows


def rollout_file(stage: str, step: int) -> str:
    """The file's path within the run folder; sorts by step."""
    return f"{ROLLOUTS_FOLDER}/{stage.replace('/', '_')}-{step:06d}.parquet"


def write_rollouts(
    run_dir: Path, *, stage: str, step: int, attempt: int, time: float, rows: Iterable[RolloutRow]
) -> str:
    """Writes the rows of one step, replacing those of an earlier attempt; returns the path within the run
    folder. The file appears complete or not at all. Raises OSError when the disk refuses."""
    import pyarrow as pa  # 0.3 s to import: only where rollouts are kept
    import pyarrow.parquet as pq

    types = {
        str: pa.string(),
        int: pa.int64(),
        float: pa.float64(),
        dict[str, float]: pa.map_(pa.string(), pa.float64()),
    }
    columns = {"stage": str, "step": int, "attempt": int, "time": float, **get_type_hints(RolloutRow)}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    header = {"stage": stage, "step": step, "attempt": attempt, "time": time}
    records = [{**header, **asdict(row), "parts": list(row.parts.items())} for row in rows]
    relative = rollout_file(stage, step)
    target = run_dir / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        pq.write_table(pa.Table.from_pylist(records, schema=schema), unfinished, compression="zstd")
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return relative


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRollout:
    """A row read back, with the step it belongs to."""

    stage: str
    step: int
    attempt: int
    time: float
    row: RolloutRow


def read_rollouts(path: Path) -> list[KeptRollout]:
    """The rows of one file. Raises OSError or ValueError (pyarrow's errors are both) for a file that is not
    one of ours."""
    import pyarrow.parquet as pq

    kept = []
    for record in pq.read_table(path).to_pylist():
        header = {name: record.pop(name) for name in ("stage", "step", "attempt", "time")}
        record["parts"] = dict(record["parts"] or ())
        kept.append(KeptRollout(**header, row=RolloutRow(**record)))
    return kept
