"""`treadle verify` and `treadle rescore`, run as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from treadle.platform.config import to_yaml
from treadle.platform.tracking.rollouts import RolloutRow, write_rollouts
from treadle.workflows.recipe import load_recipe

pytestmark = pytest.mark.processes

GOOD = "<think>7+5</think><answer>132</answer>"
ENDED = f"{GOOD}<eos>"
"""As a run keeps it: with the text of its tokenizer's EOS."""
WRONG = "<think>7+5</think><answer>133</answer>"


def treadle(*words: str | Path, code: int = 0) -> tuple[str, str]:
    """Standard output and error of `treadle …`, which must end with this code."""
    command = [sys.executable, "-m", "treadle.workflows.cli", *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout, ended.stderr


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_file_is_judged_and_shown_as_a_table(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "answers.jsonl",
        {"completion": GOOD, "answer": "132"},
        {"completion": WRONG, "payload": {"answer": "132"}},
        {"completion": GOOD, "answer": "132", "finished": False},
        {"completion": r"\boxed{\frac12}", "answer": "0.5", "verifier": "math"},
    )
    out, _ = treadle("verify", file, "--verifier", "exact")
    table = out.splitlines()
    assert table[0].split() == ["where", "status", "reward", "parts", "ms", "detail"]
    assert [line.split()[:3] for line in table[1:5]] == [
        ["answers.jsonl:1", "scored", "1.100"],
        ["answers.jsonl:2", "scored", "0.100"],
        ["answers.jsonl:3", "scored", "1.000"],
        ["answers.jsonl:4", "scored", "1.000"],
    ]
    assert "4 scored (mean reward 0.800; accuracy 0.750, format 0.500), 0 failed, 0 timed out" in table[-1]


def test_verdicts_are_written_as_json_and_name_their_versions(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "in.jsonl", {"completion": GOOD, "answer": "132"}, {"completion": "x", "answer": "x"}
    )
    out, _ = treadle("verify", file, "--verifier", "exact", "--json", "--out", tmp_path / "verdicts.jsonl")
    result = json.loads(out)
    assert (result["judged"], result["scored"], result["skipped_rows"]) == (2, 2, 0)
    assert [version.split("/")[0] for version in result["verifiers"]] == ["exact"]
    written = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in written] == [1.1, 1.0]
    assert written[0]["parts"] == {"accuracy": 1.0, "format": 1.0}
    assert written[1]["where"].endswith("in.jsonl:2")


def test_a_verifier_that_fails_is_told_and_is_no_zero(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "in.jsonl", {"completion": "5", "payload": {"unit": "m"}}, {"completion": "5", "answer": 5}
    )
    out, _ = treadle("verify", file, "--verifier", "numeric", "--json", code=1)
    result = json.loads(out)
    assert (result["failed"], result["scored"], result["reward_mean"]) == (1, 1, 1.0)


def test_settings_of_the_pool_can_be_given(tmp_path: Path) -> None:
    file = lines(tmp_path / "in.jsonl", {"completion": r"\boxed{9^{9^{9^{9^9}}}+x}", "answer": "x^2"})
    out, _ = treadle(
        "verify", file, "verify.deadline_s=0.5", "verify.parts={accuracy: 2.0}", "--verifier", "math"
    )
    assert "math: no verdict within verify.deadline_s=0.5" in out
    assert "1 timed out" in out


@pytest.mark.parametrize(
    ("row", "words", "says"),
    [
        ({"answer": "5"}, ["--verifier", "exact"], 'in.jsonl:1: the field "completion" is missing'),
        ({"completion": 5, "answer": "5"}, ["--verifier", "exact"], 'the field "completion" is no text'),
        ({"completion": "5", "answer": "5"}, [], 'neither the field "verifier" nor --verifier names one'),
        ({"completion": "5"}, ["--verifier", "exact"], 'neither "answer" nor "payload" says what is right'),
        (
            {"completion": "5", "answer": "5"},
            ["--verifier", "exakt"],
            "names the verifier 'exakt', which does not exist",
        ),
        (
            {"completion": "5", "answer": "5", "finished": 1},
            ["--verifier", "exact"],
            'the field "finished" must be',
        ),
        ("{", ["--verifier", "exact"], "in.jsonl:1: not valid JSON"),
        (
            {"completion": "5", "answer": "5"},
            ["verify.dedline_s=1", "--verifier", "exact"],
            "Did you mean 'deadline_s'",
        ),
        (
            {"completion": "5", "answer": "5"},
            ["verify.options.math.allow_it=true", "--verifier", "math"],
            "verify.options.math.allow_it is not an option of math",
        ),
    ],
)
def test_bad_input_gets_one_message_and_a_code(
    tmp_path: Path, row: object, words: list[str], says: str
) -> None:
    file = lines(tmp_path / "in.jsonl", row)
    command = [sys.executable, "-m", "treadle.workflows.cli", "verify", str(file), *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode != 0
    assert says in ended.stderr
    assert ended.stderr.count("treadle: ") == 1
    assert "Traceback" not in ended.stderr


def test_broken_rows_are_counted_when_they_may_be(tmp_path: Path) -> None:
    file = lines(tmp_path / "in.jsonl", "{", {"completion": "5", "answer": "5"})
    out, _ = treadle("verify", file, "--verifier", "exact", "--skip-bad", "--json")
    result = json.loads(out)
    assert (result["judged"], result["skipped_rows"]) == (1, 1)


def kept(index: int, completion: str, **changes: Any) -> RolloutRow:
    fields: dict[str, Any] = {
        "group_id": f"grpo/{index}",
        "prompt_id": f"p{index}",
        "prompt": "47+85=",
        "sample_index": 0,
        "completion": completion,
        "thinking": "",
        "answer": "",
        "reward": 1.1,
        "status": "scored",
        "detail": "",
        "parts": {"accuracy": 1.0, "format": 1.0},
        "verifier": "exact/1+format/1",
        "version_oldest": 3,
        "version_newest": 3,
        "length_tokens": 9,
        "stop": "eos",
        "worker": "rollout-0",
        "generate_s": 0.1,
        "verify_s": 0.001,
        "verifier_name": "exact",
        "payload": '{"answer": "132"}',
    }
    return RolloutRow(**{**fields, **changes})


def finished_run(folder: Path, rows: list[RolloutRow]) -> Path:
    recipe = load_recipe("demo")
    recipe.tokenizer.write(folder / "artifacts" / "tokenizer")
    (folder / "config.yaml").write_text(to_yaml(recipe))
    write_rollouts(folder, stage="grpo", step=3, attempt=1, time=0.0, rows=rows)
    return folder


def test_rescoring_says_whose_reward_changed(tmp_path: Path) -> None:
    run = finished_run(
        tmp_path / "run",
        [
            kept(0, ENDED),
            kept(1, WRONG),  # was scored as right
            kept(2, GOOD, reward=float("nan"), status="failed", parts={}),  # the verifier had broken
            kept(3, GOOD, stop="length", reward=1.0, parts={"accuracy": 1.0, "format": 0.0}),
        ],
    )
    out, _ = treadle("rescore", run, "--json", "--out", tmp_path / "changes.jsonl")
    result = json.loads(out)
    assert (result["judged"], result["changed"]) == (4, 2)
    changes = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
    assert [(c["prompt_id"], c["before"]["reward"], c["reward"]) for c in changes] == [
        ("p1", 1.1, 0.1),
        ("p2", None, 1.1),
    ]
    text, _ = treadle("rescore", run)
    assert "grpo/1 sample 0" in text
    assert "2 of 4 rewards changed; mean 1.067 → 0.825" in text


def test_rescoring_with_another_verifier_uses_that_one(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", [kept(0, "<think>x</think><answer>132.0</answer>", reward=0.1)])
    result = json.loads(treadle("rescore", run, "--verifier", "numeric", "--json")[0])
    assert next(iter(result["verifiers"])).startswith("numeric/")
    assert result["reward_mean"] == pytest.approx(1.1)


def test_a_run_without_kept_completions_cannot_be_rescored(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", [kept(0, GOOD, payload="")])
    assert "without their tasks" in treadle("rescore", run, code=2)[1]
    (run / "rollouts" / "grpo-000003.parquet").unlink()
    assert "has kept no completions" in treadle("rescore", run, code=2)[1]
