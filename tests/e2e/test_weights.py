"""A GRPO run whose weights travel as deltas ends with the bits of one whose weights travel whole, whatever happens on
the way. In bf16 and at the learning rates of its users: in fp32 every element changes in every step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.e2e.buckets import served_bucket
from tests.e2e.programs import TINY, WITH_PROMPTS, patiently, samples_of, summary_of

from treadle.platform import metric_names as names
from treadle.platform.storage import open_store

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.slow, pytest.mark.timeout(3600)]

BF16 = (
    "learner.dtype=bf16",
    "rollout.dtype=bfloat16",
    "broadcast.probe_limit=0.1",
    "stages.rl.optim.lr=1.0e-5",
)
FAULTS = (
    "broadcast.in_transit=corrupt@2",  # a bit of the first delta
    "broadcast.truncated=corrupt@4",
    "broadcast.stale_base=corrupt@3",
    "broadcast.lost_write=corrupt@4",
)


def trained(folder: Path, *settings: str, **environment: str) -> Path:
    program, ended = patiently(
        *("run", str(TINY), WITH_PROMPTS, *BF16, *settings, "--dir", str(folder)), **environment
    )
    assert ended.code == 0, ended
    assert program.all_gone(), program.survivors()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def by_delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by_delta")
    (folder / "once").mkdir()
    run = trained(
        folder / "run",
        "broadcast.delta=auto",
        TREADLE_FAILPOINTS=";".join(FAULTS),
        TREADLE_FAILPOINTS_ONCE=str(folder / "once"),
    )
    assert len(list((folder / "once").iterdir())) == len(FAULTS), "a fault did not happen"
    return run


def metrics_of(folder: Path) -> list[Mapping[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line)["metrics"] for line in lines]
    return [row for row in rows if names.WEIGHTS_DENSE_BYTES in row]


def test_damaged_deltas_change_no_bit_and_no_sample(by_delta: Path, whole: Path) -> None:
    mine, theirs = summary_of(by_delta), summary_of(whole)
    assert mine["weights_digest"] == theirs["weights_digest"]
    assert mine["eval"] == theirs["eval"]
    assert samples_of(by_delta) == samples_of(whole)
    assert mine["recoveries"] == 0


def test_engines_think_what_the_learner_thinks_to_the_same_digit(by_delta: Path, whole: Path) -> None:
    gaps = [[row[names.MISMATCH_MAX] for row in metrics_of(folder)] for folder in (by_delta, whole)]
    assert len(gaps[0]) == 6
    assert gaps[0] == gaps[1]


def test_damages_are_counted_and_only_changes_travel(by_delta: Path, whole: Path) -> None:
    rows, plain = metrics_of(by_delta), metrics_of(whole)
    assert sum(row[names.WEIGHTS_REFUSED] for row in rows) >= len(FAULTS)
    assert sum(row[names.WEIGHTS_REFUSED] for row in plain) == 0
    untouched = [row for row in rows if not row[names.WEIGHTS_REFUSED]]
    assert untouched
    for row in untouched:
        assert row[names.WEIGHTS_BY_DELTA] == 2
        assert row[names.WEIGHTS_SENT_BYTES] < row[names.WEIGHTS_DENSE_BYTES] / 5
        assert 0.02 < row[names.WEIGHTS_DENSITY] < 0.5
    assert all(row[names.WEIGHTS_SENT_BYTES] == row[names.WEIGHTS_DENSE_BYTES] for row in plain)
    print("times smaller:", [r[names.WEIGHTS_DENSE_BYTES] / r[names.WEIGHTS_SENT_BYTES] for r in untouched])
    assert 'id="weights"' in (by_delta / "report.html").read_text()


@pytest.mark.s3
@pytest.mark.parametrize("delta", ["off", "auto"])
def test_through_a_bucket_that_fails_stalls_and_lies_they_are_the_same_bits(
    whole: Path, tmp_path: Path, delta: str
) -> None:
    troubles = ["flip", "cut", "404", "503", "stall", "flip", "reset", "cut"]
    with served_bucket() as bucket:
        bucket.faults.concern = lambda method, path: method == "GET" and "/probe-" not in path
        bucket.faults.due = list(troubles)
        run = trained(
            tmp_path / "run",
            *("broadcast.transport=url", f"broadcast.url={bucket.url}", "broadcast.url_timeout_s=1.5"),
            f"broadcast.delta={delta}",
        )
        assert not bucket.faults.due, "a fault did not happen"
        assert open_store(bucket.url).files() == {}
    mine, theirs = summary_of(run), summary_of(whole)
    assert mine["weights_digest"] == theirs["weights_digest"]
    assert samples_of(run) == samples_of(whole)
    assert mine["recoveries"] == 0
    rows = metrics_of(run)
    assert sum(row[names.WEIGHTS_BEHIND] for row in rows) == 0
    assert {row[names.WEIGHTS_BY_DELTA] for row in rows} == ({2} if delta == "auto" else {0})


@pytest.mark.s3
@pytest.mark.chaos
def test_whoever_is_killed_on_the_way_through_a_bucket_leaves_the_same_bits_and_no_object(
    whole: Path, tmp_path: Path
) -> None:
    """A coordinator between the phases, a rank that has made a step, an engine that has staged it; then the driver."""
    kills = (
        "broadcast.between_phases=kill@2",
        "learner.after_optimizer_step=kill@3",
        "rollout.before_flip=kill@5",
    )
    (tmp_path / "once").mkdir()
    folder = tmp_path / "run"
    with served_bucket() as bucket:
        _, ended = patiently(
            *("run", str(TINY), WITH_PROMPTS, *BF16, "--dir", str(folder)),
            *("broadcast.delta=auto", "broadcast.transport=url", f"broadcast.url={bucket.url}"),
            TREADLE_FAILPOINTS=";".join([*kills, "driver.after_lease=kill@6"]),
            TREADLE_FAILPOINTS_ONCE=str(tmp_path / "once"),
        )
        assert ended.code == -9, ended
        assert len(list((tmp_path / "once").iterdir())) == len(kills) + 1, "a fault did not happen"
        assert open_store(bucket.url).files()
        program, ended = patiently("resume", str(folder))
        assert ended.code == 0, ended
        assert program.all_gone(), program.survivors()
        assert open_store(bucket.url).files() == {}
    assert summary_of(folder)["weights_digest"] == summary_of(whole)["weights_digest"]
    assert samples_of(folder) == samples_of(whole)


@pytest.mark.vllm
@pytest.mark.s3
def test_a_vllm_engine_fed_through_a_bucket_refuses_every_damage_and_the_run_goes_on(tmp_path: Path) -> None:
    """An engine that is not behind has answered every version with the learner's digest of it."""
    (tmp_path / "once").mkdir()
    with served_bucket() as bucket:
        run = trained(
            tmp_path / "run",
            *("broadcast.delta=auto", "broadcast.transport=url", f"broadcast.url={bucket.url}"),
            *("rollout.engine=vllm", "rollout.workers=1", "stages.rl.model.hidden=64", "stages.rl.steps=4"),
            # One engine passes these points less often than two.
            TREADLE_FAILPOINTS=";".join([*FAULTS[:3], "broadcast.lost_write=corrupt@2"]),
            TREADLE_FAILPOINTS_ONCE=str(tmp_path / "once"),
        )
        assert open_store(bucket.url).files() == {}
    assert len(list((tmp_path / "once").iterdir())) == len(FAULTS), "a fault did not happen"
    rows = metrics_of(run)
    assert len(rows) == 4
    assert sum(row[names.WEIGHTS_REFUSED] for row in rows) >= len(FAULTS)
    assert all(row[names.WEIGHTS_BEHIND] == 0 for row in rows)
    assert any(row[names.WEIGHTS_BY_DELTA] for row in rows)
    print("engine against learner:", [row[names.MISMATCH_MAX] for row in rows])
    assert max(row[names.MISMATCH_MAX] for row in rows) < 0.1
