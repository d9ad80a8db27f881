"""Sampled rollouts as MLflow traces, linked to their stage's run. Imported only by the feeding process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from mlflow.entities import Span, SpanType, TraceInfo, TraceLocation, TraceState
from mlflow.tracing.client import TracingClient
from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey, TraceTagKey

from treadle.platform.records import Json
from treadle.platform.tracking.rollouts import KeptRollout

PREVIEW_CHARS = 1000


def send_traces(client: TracingClient, experiment_id: str, run_id: str, kept: Iterable[KeptRollout]) -> None:
    """One trace per rollout: a root span with prompt and completion, and below it drawing and judging. A
    trace sent twice is the same trace."""
    spans: list[Span] = []
    for rollout in kept:
        trace_id = _trace_id(run_id, rollout)
        client.start_trace(_info(trace_id, experiment_id, run_id, rollout))
        spans += _spans(trace_id, rollout)
    if spans:
        client.log_spans(experiment_id, spans)


def _trace_id(run_id: str, kept: KeptRollout) -> str:
    what = f"{run_id}|{kept.stage}|{kept.step}|{kept.attempt}|{kept.row.group_id}|{kept.row.sample_index}"
    return "tr-" + hashlib.blake2b(what.encode(), digest_size=16).hexdigest()


def _info(trace_id: str, experiment_id: str, run_id: str, kept: KeptRollout) -> TraceInfo:
    row = kept.row
    tags = {
        TraceTagKey.TRACE_NAME: f"{kept.stage} rollout",
        "stage": kept.stage,
        "step": str(kept.step),
        "attempt": str(kept.attempt),
        "group_id": row.group_id,
        "prompt_id": row.prompt_id,
        "sample_index": str(row.sample_index),
        "status": row.status,
        "reward": f"{row.reward:g}",
        "version": str(row.version_newest),
    }
    return TraceInfo(
        trace_id=trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=int(kept.time * 1000),
        state=TraceState.OK if row.status == "scored" else TraceState.ERROR,
        request_preview=row.prompt[:PREVIEW_CHARS],
        response_preview=(row.answer or row.completion)[:PREVIEW_CHARS],
        execution_duration=int((row.generate_s + row.verify_s) * 1000),
        trace_metadata={TraceMetadataKey.SOURCE_RUN: run_id},
        tags=tags,
    )


def _spans(trace_id: str, kept: KeptRollout) -> list[Span]:
    row = kept.row
    start_ns = int(kept.time * 1e9)
    drawn_ns = start_ns + int(row.generate_s * 1e9)
    end_ns = drawn_ns + int(row.verify_s * 1e9)
    failed = "" if row.status == "scored" else row.detail or row.status
    answer: dict[str, Json] = {"thinking": row.thinking, "answer": row.answer, "completion": row.completion}
    verdict: dict[str, Json] = {
        "status": row.status,
        "reward": _finite(row.reward),
        "parts": {name: _finite(value) for name, value in row.parts.items()},
        "detail": row.detail,
    }
    facts: dict[str, Json] = {
        **{f"verdict.{name}": value for name, value in verdict.items()},
        "version_oldest": row.version_oldest,
        "version_newest": row.version_newest,
        "group_id": row.group_id,
        "prompt_id": row.prompt_id,
        "sample_index": row.sample_index,
        "length_tokens": row.length_tokens,
        "stop": row.stop,
        "worker": row.worker,
        "verifier": row.verifier,
    }
    prompt: dict[str, Json] = {"prompt": row.prompt}
    root = _span(trace_id, "rollout", "", SpanType.CHAIN, start_ns, end_ns, prompt, answer, facts, failed)
    draw = _span(trace_id, "generate", root.span_id, SpanType.LLM, start_ns, drawn_ns, prompt, answer, {}, "")
    judge = _span(
        trace_id, "verify", root.span_id, SpanType.EVALUATOR, drawn_ns, end_ns, answer, verdict, {}, failed
    )
    return [root, draw, judge]


def _span(
    trace_id: str,
    name: str,
    parent_id: str,
    span_type: str,
    start_ns: int,
    end_ns: int,
    inputs: Mapping[str, Json],
    outputs: Mapping[str, Json],
    facts: Mapping[str, Json],
    failed: str,
) -> Span:
    """A finished span; MLflow keeps every attribute as JSON text."""
    attributes = {
        SpanAttributeKey.REQUEST_ID: trace_id,
        SpanAttributeKey.SPAN_TYPE: span_type,
        SpanAttributeKey.INPUTS: inputs,
        SpanAttributeKey.OUTPUTS: outputs,
        **facts,
    }
    span_id = hashlib.blake2b(f"{trace_id}|{name}".encode(), digest_size=8).hexdigest()
    return Span.from_dict(
        {
            "trace_id": trace_id,
            "span_id": span_id,
            "parent_span_id": parent_id,
            "name": name,
            "start_time_unix_nano": start_ns,
            "end_time_unix_nano": max(end_ns, start_ns + 1),
            "status": {"code": "ERROR" if failed else "OK", "message": failed},
            "attributes": {key: json.dumps(value) for key, value in attributes.items()},
        }
    )


def _finite(value: float) -> float | None:
    """JSON has no NaN: a verdict without a reward has none."""
    return value if value == value else None
