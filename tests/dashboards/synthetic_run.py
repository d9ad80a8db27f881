"""A run folder as a miniature R1 leaves it, with a rollback, failures and a hostile completion in it.

Run as a program it writes the folder and its report: `python tests/dashboards/synthetic_run.py FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from treadle.platform.ledger import Ledger
from treadle.platform.tracking.rollouts import RolloutRow, write_rollouts
from treadle.platform.tracking.spool import EVENTS_FILE, METRICS_FILE, SpoolWriter

BEGAN = 1_767_225_600.0
CHAIN_COUNT = 10
HOSTILE = (
    "<think><script>document.title='owned'</script></think><answer><img src=x onerror=alert(1)></answer>"
)
STEPS = {"pretrain": 240, "sft": 120, "grpo": 200, "distill": 90}
CHECKPOINT_EVERY = 25


def write_run(folder: Path, seed: int = 3) -> Path:
    """Writes everything a finished run has, and returns the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    metrics, events = SpoolWriter(folder / METRICS_FILE), SpoolWriter(folder / EVENTS_FILE)
    clock = _Clock(metrics, events)
    clock.event("run_start", "", name="miniature R1", version="0.1.0", params={})
    for stage, steps in STEPS.items():
        clock.event("stage_start", stage, total_steps=steps)
        began = clock.now
        _stage(clock, stage, steps, rng)
        clock.event("stage_end", stage, status="finished", elapsed_s=clock.now - began)
    clock.event("run_end", "", status="finished", elapsed_s=clock.now - BEGAN)
    metrics.close()
    events.close()
    _files(folder, clock.now - BEGAN)
    _rollouts(folder, rng)
    _ledger(folder, rng)
    return folder


def _ledger(folder: Path, rng: np.random.Generator, steps: int = 20, groups: int = 24) -> None:
    """The first steps of GRPO as the ledger sees them, rolled back once from step 15 to the mark at 10."""
    with Ledger.open(folder / "ledger.sqlite") as ledger, ledger.batch():
        _issue_and_train(ledger, rng, range(10), groups)
    with Ledger.open(folder / "ledger.sqlite") as ledger:
        ledger.commit_mark("grpo", 10, 10 * groups)
        with ledger.batch():
            _issue_and_train(ledger, rng, range(10, 15), groups)
        ledger.rollback_to("grpo", 10)
        with ledger.batch():
            _issue_and_train(ledger, rng, range(10, steps), groups)


def _issue_and_train(ledger: Ledger, rng: np.random.Generator, steps: range, groups: int) -> None:
    for step in steps:
        ids = [f"grpo/{number:08d}" for number in range(step * groups, (step + 1) * groups)]
        for group in ids:
            ledger.issue(group, f"addition-{group[-3:]}", step)
            ledger.drawn(group, step, step, 160)
            late = int(rng.random() < 0.01)
            ledger.scored(group, scored=8 - late, failed=0, timed_out=late)
        dropped = [group for group in ids if rng.random() < 0.04]
        if dropped:
            ledger.drop(dropped, "too_stale" if rng.random() < 0.3 else "no_signal")
        ledger.lease([group for group in ids if group not in dropped], step)
        ledger.trained("grpo", step)


class _Clock:
    """Writes spool lines with a clock of its own."""

    def __init__(self, metrics: SpoolWriter, events: SpoolWriter) -> None:
        self.now, self.attempt = BEGAN, 1
        self._metrics, self._events = metrics, events

    def event(self, kind: str, stage: str, **fields: object) -> None:
        record = {"kind": kind, "stage": stage, "attempt": self.attempt, "time": self.now, "fields": fields}
        self._events.append(record)  # type: ignore[arg-type]

    def log(self, stage: str, step: int, figures: dict[str, float]) -> None:
        self.now += figures["timing_s/step"]
        self._metrics.append(
            {
                "stage": stage,
                "step": step,
                "attempt": self.attempt,
                "time": self.now,
                "elapsed_s": self.now - BEGAN,
                "metrics": dict(figures),
            }
        )


def _stage(clock: _Clock, stage: str, steps: int, rng: np.random.Generator) -> None:
    if stage != "grpo":
        for step in range(steps):
            clock.log(stage, step, _fit(step / steps, stage, rng))
        return
    for step in range(143):
        clock.log(stage, step, _grpo(step, steps, rng))
        if step == 61:
            clock.event(
                "failure", stage, role="verify", phase="score", prompt_id="addition-61+49",
                message="worker 3 did not answer within 2 s and was ended", node="127.0.0.1",
            )  # fmt: skip
    clock.event(
        "failure", stage, role="learner", phase="backward", rank=1, message="rank 1 was killed by signal 9"
    )
    clock.attempt = 2
    clock.now += 21
    clock.event("run_start", "", name="miniature R1", version="0.1.0", params={})
    for step in range(125, steps):
        clock.log(stage, step, _grpo(step, steps, rng))
    clock.event("skipped", stage, step=177, reason="gradient norm is not finite")


def _fit(done: float, stage: str, rng: np.random.Generator) -> dict[str, float]:
    floor = {"pretrain": 1.1, "sft": 0.35, "distill": 0.2}[stage]
    learn = 0.09 + 0.004 * rng.random()
    return {
        "policy/loss": float(floor + 2.6 * np.exp(-5 * done) + 0.05 * rng.standard_normal()),
        "policy/grad_norm": float(0.6 + 2 * np.exp(-6 * done) + 0.1 * rng.random()),
        "policy/lr": float(1e-3 * min(1.0, done * 20) * (1 - 0.9 * done)),
        "perf/tokens_per_s": float(31_000 + 1500 * rng.standard_normal()),
        "timing_s/learn": learn,
        "timing_s/step": learn + 0.006,
    }


def _grpo(step: int, steps: int, rng: np.random.Generator) -> dict[str, float]:
    done = step / steps
    accuracy = float(np.clip(0.41 + 0.5 * (1 - np.exp(-3.2 * done)) + 0.03 * rng.standard_normal(), 0, 1))
    shape = float(np.clip(0.88 + 0.11 * (1 - np.exp(-6 * done)) + 0.01 * rng.standard_normal(), 0, 1))
    generate, learn, publish = 0.21 + 0.05 * rng.random(), 0.17 + 0.01 * rng.random(), 0.012
    checkpoint = 0.09 if step % CHECKPOINT_EVERY == 0 else 0.0
    verify = 0.03 + 0.01 * rng.random()
    figures = {
        "reward/mean": accuracy + 0.1 * shape,
        "reward/std": 0.45 * (1 - done) + 0.1,
        "reward/part/accuracy": accuracy,
        "reward/part/format": 0.1 * shape,
        "accuracy/sampled": accuracy,
        "response_length/mean": float(18.5 + 3 * done + 0.4 * rng.standard_normal()),
        "response_length/max": float(26 + 2 * rng.random()),
        "response_length/clip_ratio": float(0.05 * np.exp(-4 * done)),
        "policy/loss": float(0.01 * rng.standard_normal() - 0.01),
        "policy/entropy": float(0.42 * np.exp(-1.6 * done) + 0.01 * rng.random()),
        "policy/clip_fraction": float(0.004 + 0.002 * rng.random()),
        "policy/grad_norm": float("nan") if step == 177 else float(0.35 + 0.12 * rng.random()),
        "policy/lr": 2e-4,
        "mismatch/kl": float(2e-7 * (1 + rng.random())),
        "mismatch/max": float(3e-5 * (1 + rng.random())),
        "staleness/mean": 0.0,
        "staleness/max": 0.0,
        "groups/zero_std": float(np.clip(0.1 + 0.5 * done + 0.05 * rng.standard_normal(), 0, 1)),
        "samples/failed": 0.0,
        "samples/timed_out": 1.0 if step == 61 else 0.0,
        "weights/sent_bytes": 1.7e6,
        "perf/tokens_per_s": float(8600 + 500 * rng.standard_normal()),
        "timing_s/generate": generate,
        "timing_s/verify": verify,
        "timing_s/wait": generate + verify,
        "timing_s/learn": learn,
        "timing_s/publish": publish,
        "timing_s/step": generate + verify + learn + publish + checkpoint + 0.015,
    }
    return figures | ({"timing_s/checkpoint": checkpoint} if checkpoint else {})


def _files(folder: Path, wall_s: float) -> None:
    summary = {
        "name": "miniature R1",
        "weights_digest": "9f3c1a77d20be8415c6f0e92ab4471d3",
        "steps": sum(STEPS.values()),
        "wall_s": wall_s,
        "time_to_first_step_s": 18.4,
        "eval": {
            "sft": {"sampled": 0.431, "greedy": 0.74, "n": 256, "ci95": 0.041},
            "grpo": {"sampled": 0.902, "greedy": 0.957, "n": 256, "ci95": 0.024},
            "student": {"sampled": 0.884, "greedy": 0.941, "n": 256, "ci95": 0.027},
        },
        "samples": {"issued": 38592, "trained": 38388, "dropped": 196, "failed": 3, "timed_out": 5},
        "stages": list(STEPS),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "run.json").write_text(json.dumps({"state": "done", "attempts": 2}))
    diff = [
        ["seed", 0, 7],
        ["grpo.prompts_per_step", 128, 24],
        ["grpo.lr", 1e-06, 0.0002],
        ["grpo.clip_high", 0.2, 0.28],
        ["grpo.max_new_tokens", 4096, 28],
        ["learner.backend", "deepspeed", "deepspeed"],
        ["cluster.auth_token", None, "canary-in-the-diff"],
    ]
    (folder / "config_diff.json").write_text(json.dumps(diff))
    (folder / "config.yaml").write_text(
        "seed: 7\ngrpo:\n  lr: 0.0002\n  prompts_per_step: 24\n  max_new_tokens: 28\n"
        "cluster:\n  auth_token: canary-in-the-config\nstages: [pretrain, sft, grpo, distill]\n"
    )
    (folder / "chains.json").write_text(json.dumps([_chain(index) for index in range(CHAIN_COUNT + 2)]))


def _chain(index: int) -> dict[str, object]:
    rng = np.random.default_rng(index)
    a, b = int(rng.integers(10, 99)), int(rng.integers(10, 99))
    right, slip = a + b, a + b - 10 if index % 2 else a + b
    ones = a % 10 + b % 10
    work = f"{a % 10}+{b % 10}={ones}" + (" carry 1" if ones > 9 else "")
    tens = f"{a // 10}+{b // 10}{'+1' if ones > 9 else ''}={a // 10 + b // 10 + (ones > 9)}"
    good = f"<think>{work}\n{tens}</think><answer>{right}</answer><eos>"
    bad = f"<think>{work}\n{a // 10}+{b // 10}={a // 10 + b // 10}</think><answer>{slip}</answer><eos>"
    first = HOSTILE if index == 3 else bad
    return {
        "prompt": f"{a}+{b}=",
        "answer": str(right),
        "stages": {
            "sft": {
                "text": first,
                "reward": 1.1 if slip == right and index != 3 else 0.1,
                "status": "scored",
            },
            "grpo": {"text": good, "reward": 1.1, "status": "scored"},
            "student": (
                {"text": good, "reward": float("nan"), "status": "timed_out"}
                if index == 8
                else {"text": good, "reward": 1.1, "status": "scored"}
            ),
        },
    }


def _rollouts(folder: Path, rng: np.random.Generator) -> None:
    rows = []
    for index in range(6):
        a, b = (int(v) for v in rng.integers(10, 99, size=2))
        failed = index == 4
        rows.append(
            RolloutRow(
                group_id=f"grpo/{4776 + index}", prompt_id=f"addition-{a}+{b}", prompt=f"{a}+{b}=",
                sample_index=index, completion=f"<think>…</think><answer>{a + b}</answer>", thinking="…",
                answer=str(a + b), reward=float("nan") if failed else 1.1, parts={"accuracy": 1.0},
                status="timed_out" if failed else "scored", detail="", verifier="exact/1", version_oldest=190,
                version_newest=190, length_tokens=20 + index, stop="eos", worker="rollout-0", generate_s=0.2,
                verify_s=0.002,
            )
        )  # fmt: skip
    write_rollouts(folder, stage="grpo", step=190, attempt=2, time=BEGAN + 200, rows=rows)


if __name__ == "__main__":
    from treadle.dashboards.report import write_report

    print(write_report(write_run(Path(sys.argv[1]))))
