"""Canary secrets reach none of the sinks."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest

from treadle.platform.tracking import (
    Redactor,
    RolloutRow,
    RunTracker,
    TrackingConfig,
    flatten,
    read_rollouts,
)
from treadle.platform.tracking.redact import REDACTED, is_secret_name

CANARY = "canary-7f3a9c51e2d8"


SECRET_NAMES = """token hf_token RAY_AUTH_TOKEN authToken password db.password s3.secret api_key apikey
    AWS_SECRET_ACCESS_KEY credentials MLFLOW_TRACKING_PASSWORD privateKey"""


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_a_secret_is_known_by_the_name_of_its_setting(name: str) -> None:
    assert is_secret_name(name)
    assert Redactor({}).value({name: CANARY}) == {name: REDACTED}


@pytest.mark.parametrize("name", ["tokenizer", "keyboard", "RAY_AUTH_MODE", "token_path", "lr", "monkey"])
def test_an_innocent_name_keeps_its_value(name: str) -> None:
    assert Redactor({}).value({name: "value"}) == {name: "value"}


def test_figures_whose_name_speaks_of_tokens_are_kept_also_as_text() -> None:
    settings = {"max_new_tokens": 28, "pad_token_id": 0, "skip_special_tokens": True}
    assert Redactor({}).value(dict(settings)) == settings
    flat = flatten(settings)
    assert Redactor({}).value(dict(flat)) == flat


def test_a_number_can_be_a_password() -> None:
    assert Redactor({}).value({"password": 12345678, "auth_token": "12345678"}) == {
        "password": REDACTED,
        "auth_token": REDACTED,
    }


def test_lists_and_nested_settings_are_searched() -> None:
    value = {"sinks": [{"token": CANARY}], "auth_tokens": [CANARY], "outer": {"inner": {"secret": CANARY}}}
    assert CANARY not in str(Redactor({}).value(value))


def test_the_values_of_secret_variables_are_found_anywhere() -> None:
    redactor = Redactor({"RAY_AUTH_TOKEN": CANARY, "HOME": "/home/user", "MY_KEY": "short"})
    assert redactor.text(f"x{CANARY}y /home/user short") == f"x{REDACTED}y /home/user short"


@pytest.mark.parametrize(
    "text",
    [
        "http://user:hunter2pass@host/api",
        "Authorization: Bearer abcdef0123456789",
        "hf_AbCdEfGhIjKlMnOpQrStUv",
        "AKIAABCDEFGHIJKLMNOP",
        "sk-proj-abcdefghijklmnopqrstuvwx",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl",
    ],
)
def test_credentials_are_known_by_their_shape(text: str) -> None:
    redacted = Redactor({}).text(text)
    assert REDACTED in redacted
    assert len(redacted) < len(text) + len(REDACTED)
    assert not any(part in redacted for part in ("hunter2pass", "abcdef012345", "AbCdEf", "KIAAB", "c2lnb"))


def test_assignments_in_messages_are_redacted_and_figures_are_not() -> None:
    message = Redactor({}).message(f"failed with api_key={CANARY} and max_new_tokens=4096, step=12")
    assert message == f"failed with api_key={REDACTED} and max_new_tokens=4096, step=12"


def test_reasoning_is_left_as_the_model_wrote_it() -> None:
    text = "<think>47+85: 7+5=12, carry 1; key=13</think><answer>132</answer>"
    assert Redactor({}).text(text) == text


def test_a_canary_reaches_neither_the_run_folder_nor_the_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", CANARY)
    stream = io.StringIO()
    run = RunTracker(
        tmp_path,
        TrackingConfig(mlflow="off", rollouts_every=1),
        settings={"cluster": {"token": CANARY}, "storage": {"url": f"s3://id:{CANARY}@bucket/x"}},
        stream=stream,
    )
    stage = run.stage("grpo", total_steps=1)
    stage.event("failure", {"role": "rollout", "message": f"401 for token={CANARY}", "headers": [CANARY]})
    row = RolloutRow(
        group_id="g/0", prompt_id="p", prompt=CANARY, sample_index=0, completion=f"a {CANARY}",
        thinking=CANARY, answer=CANARY, reward=1.0, parts={}, status="failed", detail=f"key={CANARY}",
        verifier="exact/1", version_oldest=0, version_newest=0, length_tokens=1, stop="eos", worker="w",
        generate_s=0.0, verify_s=0.0,
    )  # fmt: skip
    stage.log(0, {"reward/mean": 1.0})
    stage.rollouts(0, [row])
    stage.close()
    run.close()
    assert CANARY not in stream.getvalue()
    (kept,) = read_rollouts(tmp_path / "rollouts" / "grpo-000000.parquet")
    assert CANARY not in str(kept)
    assert kept.row.completion == f"a {REDACTED}"
    found = subprocess.run(["grep", "-rl", CANARY, str(tmp_path)], capture_output=True, text=True)
    assert found.stdout == ""
