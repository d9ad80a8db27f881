"""A run in one JSON object: what `summary.json` holds."""

from __future__ import annotations

from collections import Counter
from typing import Any

from treadle.workflows.outputs import StageOutput
from treadle.workflows.run import Run


def summarise(run: Run) -> dict[str, Any]:
    """Of the whole run: the digest of the weights that were trained last, steps, seconds, accuracy per stage
    with its 95 % half-width, what became of all samples and groups, and of the mirror."""
    trained = [output for output in run.outputs.values() if output.kind != "export"]
    return {
        "name": run.recipe.name,
        "seed": run.recipe.seed,
        "weights_digest": trained[-1].digest if trained else "",
        "steps": sum(output.steps for output in trained),
        "wall_s": run.wall_s,
        "recoveries": run.recoveries,
        "replacements": run.replacements,
        "oom_backoffs": Counter(back_off.setting for back_off in run.back_offs),
        "time_to_first_step_s": run.first_step_s,
        "mlflow": _mlflow(run),
        "eval": {o.stage: o.evaluation.as_json() for o in trained if o.evaluation is not None},
        "samples": _samples(run),
        **({"mirror": run.mirror.summary()} if run.mirror else {}),
        "stages": {name: _stage(output) for name, output in run.outputs.items()},
    }


def _samples(run: Run) -> dict[str, Any]:
    """From the ledger. `issued`, `trained` and `dropped` count prompt groups; `failed` and `timed_out` count
    samples whose verifier broke or passed its deadline. `doubled` and `lost` must be 0."""
    audit = run.ledger.audit()
    return {
        "issued": audit.issued,
        "trained": audit.trained,
        "dropped": sum(audit.dropped.values()),
        "dropped_by_reason": dict(audit.dropped),
        "failed": audit.failed,
        "timed_out": audit.timed_out,
        "in_flight": audit.in_flight,
        "doubled": audit.doubled,
        "lost": audit.lost,
    }


def _mlflow(run: Run) -> dict[str, Any]:
    """How often MLflow was away in this attempt and came back, for how many seconds in all, and how many processes have
    fed it; `now` says what is wrong with it still. What it has not taken when the run ends waits in the spool."""
    mlflow = run.tracker.mlflow
    if mlflow is None:
        return {}
    return {
        "outages": mlflow.outages,
        "away_s": round(mlflow.away_s, 3),
        "feeders": mlflow.feeders,
        "now": mlflow.doing,
    }


def _stage(output: StageOutput) -> dict[str, Any]:
    return {
        "kind": output.kind,
        "steps": output.steps,
        "wall_s": output.wall_s,
        "digest": output.digest,
        "model": output.model,
        **({"notes": dict(output.notes)} if output.notes else {}),
    }
