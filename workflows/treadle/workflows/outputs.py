"""What a finished stage leaves behind, and how a re-run knows that it is still valid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from treadle.workflows.evaluate import EvalReport
from treadle.workflows.folder import RunFolder, read_json, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutput:
    """A stage's result. `model` is a Hugging Face folder (empty for stages that make none), `digest` the state
    digest of its weights, `key` the fingerprint of everything that went in."""

    stage: str
    kind: str
    key: str
    model: str
    digest: str
    steps: int
    wall_s: float
    evaluation: EvalReport | None
    notes: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        value = asdict(self)
        value["evaluation"] = self.evaluation.as_json() if self.evaluation else None
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StageOutput:
        evaluation = value["evaluation"]
        if evaluation is not None:
            powers = tuple((int(k), float(v)) for k, v in evaluation["pass_at_k"].items())
            evaluation = EvalReport(**{**evaluation, "pass_at_k": powers})
        return cls(**{**value, "evaluation": evaluation})


def stage_key(fingerprint: str, upstream: Mapping[str, StageOutput], seed: int) -> str:
    """Content address of a stage: its resolved settings, the weights it starts from and the seed. Settings that
    only say where things run (workers, deadlines, tracking) are not part of `fingerprint`."""
    parts = {
        "settings": fingerprint,
        "upstream": {n: o.digest or o.key for n, o in sorted(upstream.items())},
        "seed": seed,
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def finished(folder: RunFolder, stage: str, key: str) -> StageOutput | None:
    """The stage's output if it was finished with the same key, else None."""
    path = folder.output(stage)
    if not path.exists():
        return None
    output = _read(folder, path)
    return output if output.key == key else None


def record(folder: RunFolder, output: StageOutput) -> None:
    """Marks the stage as finished. Written last, so a stage is either whole or done again. A model inside the run
    folder is named relative to it, so that a folder which was moved, or fetched from a mirror, still finds it."""
    model = Path(output.model)
    inside = output.model and model.is_relative_to(folder.path)
    named = str(model.relative_to(folder.path)) if inside else output.model
    write_json(folder.output(output.stage), {**output.as_json(), "model": named})


def outputs_of(folder: RunFolder) -> dict[str, StageOutput]:
    """All finished stages of a run, in the order they ended."""
    files = sorted(folder.output("*").parent.glob("*.json"), key=_modified)
    return {file.stem: _read(folder, file) for file in files}


def _read(folder: RunFolder, file: Path) -> StageOutput:
    output = StageOutput.from_json(read_json(file))
    return replace(output, model=str(folder.path / output.model) if output.model else "")


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def closing_text(folder: RunFolder) -> str:
    """What a run prints when it has finished: each stage's evaluation, and where the report is."""
    evaluated = [(name, o.evaluation) for name, o in outputs_of(folder).items() if o.evaluation]
    lines = [f"{name:>10}  {evaluation.line()}" for name, evaluation in evaluated]
    return "\n".join([*lines, f"{'report':>10}  {folder.path / 'report.html'}"])
