"""A run's mirror without processes: what is copied, rebuilt and refused; with them: tests/e2e/test_mirror.py."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests.workflows.plain_stage import PlainLearner
from tests.workflows.test_outputs import OUTPUT

from treadle.platform.errors import ConfigError, DataError, FencedError
from treadle.platform.ledger import Ledger
from treadle.platform.mirror import Mirror
from treadle.platform.tracking import RunTracker, TrackingConfig
from treadle.workflows import commands
from treadle.workflows.folder import RunFolder
from treadle.workflows.mirroring import RunMirror, check_new_mirror, mirrored, rebuild
from treadle.workflows.outputs import outputs_of, record
from treadle.workflows.progress import describe
from treadle.workflows.recipe import load_recipe
from treadle.workflows.saving import CheckpointConfig, CheckpointKeeper, Position

PATIENCE_S = 30.0


@dataclass
class Stage:
    """A stage of a group per step in a real run folder, mirrored."""

    folder: RunFolder
    ledger: Ledger
    tracker: RunTracker
    learner: PlainLearner
    keeper: CheckpointKeeper
    mirror: RunMirror

    def play(self, steps: range) -> None:
        for step in steps:
            id_ = f"rl/{step:08d}"
            self.ledger.issue(id_, f"prompt {step}", step)
            self.ledger.drawn(id_, step, step, 5)
            self.ledger.scored(id_, scored=1, failed=0, timed_out=0)
            self.ledger.lease([id_], step)
            self.learner.state = 1000 + step + 1
            self.ledger.trained("rl", step)
            self.tracker.write_metrics("rl", step, {"reward/mean": 0.5})
            (self.folder.path / "rollouts" / f"{step}.parquet").write_bytes(b"samples of %d" % step)
            asyncio.run(self.keeper.after_step("rl", step + 1, step + 1, with_groups=True))
            assert soon(lambda: not self.mirror.figures()["mirror/lag_steps"])

    def restored(self) -> Position:
        return asyncio.run(self.keeper.restore("rl"))


def soon(holds: Callable[[], object]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(holds())


def config_of(url: Path | str, **settings: float) -> CheckpointConfig:
    return replace(CheckpointConfig(every_steps=2, keep=2, mirror=str(url)), **settings)  # type: ignore[arg-type]


@contextmanager
def stage(path: Path, config: CheckpointConfig) -> Iterator[Stage]:
    recipe = load_recipe("demo", [f"checkpoint.mirror={config.mirror}"])
    with ExitStack() as stack:
        folder = RunFolder.of(path, recipe)
        folder.tokenizer.mkdir(exist_ok=True)
        (folder.tokenizer / "tokenizer.json").write_text("{}")
        ledger = stack.enter_context(Ledger.open(folder.ledger))
        tracker = RunTracker(path, TrackingConfig(mlflow="off"), json_mode=True)
        stack.callback(tracker.close)
        mirror = stack.enter_context(mirrored(config, folder, ledger, tracker))
        assert mirror is not None
        learner = PlainLearner()
        keeper = CheckpointKeeper(config, str(folder.checkpoints), ledger, learner, mirror=mirror)
        yield Stage(folder, ledger, tracker, learner, keeper, mirror)


def events(path: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    return [(line["kind"], str(line["fields"].get("message", ""))) for line in lines]


def test_a_folder_that_is_gone_is_rebuilt_and_the_stage_goes_on(tmp_path: Path) -> None:
    url = tmp_path / "bucket"
    with stage(tmp_path / "old", config_of(url)) as old:
        old.play(range(5))
        old.ledger.issue("rl/00000005", "after the commit", 5)
    (tmp_path / "old").rename(tmp_path / "gone")
    folder = rebuild(f"file://{url}", tmp_path / "new")
    assert load_recipe(folder.config).checkpoint.mirror == str(url)
    assert folder.state()["state"] == "interrupted"
    assert sorted(p.name for p in (folder.path / "rollouts").iterdir()) == [f"{n}.parquet" for n in range(4)]
    with stage(tmp_path / "new", config_of(url)) as new:
        assert new.restored() == Position(step=4, cursor=4, pending=())
        assert new.learner.state == 1004
        new.play(range(4, 6))
        audit = new.ledger.audit("rl")
        assert (audit.trained, audit.doubled, audit.lost, audit.in_flight) == (6, 0, 0, 0)
        assert new.mirror.summary()["complete"]
    (told,) = [message for kind, message in events(tmp_path / "new") if kind == "mirror_fetched"]
    assert told.startswith("commit 3 (rl, step 4), ")
    assert [c.step for c in Mirror(str(url), timeout_s=5).commits()] == [4, 6]


def test_a_finished_stage_is_mirrored_with_its_model_and_found_in_the_new_folder(tmp_path: Path) -> None:
    url = tmp_path / "bucket"
    with stage(tmp_path / "old", config_of(url)) as old:
        model = old.folder.artifact("sft")
        model.mkdir(parents=True)
        (model / "model.safetensors").write_bytes(b"weights")
        record(old.folder, replace(OUTPUT, model=str(model)))
        asyncio.run(old.mirror.offer("sft", 7))
        asyncio.run(old.mirror.settle())
    (output,) = outputs_of(rebuild(str(url), tmp_path / "new")).values()
    assert output == replace(OUTPUT, model=str(tmp_path / "new" / "artifacts" / "sft"))
    assert (Path(output.model) / "model.safetensors").read_bytes() == b"weights"


def test_mlflow_in_the_run_folder_is_fed_anew_and_elsewhere_from_where_it_was(tmp_path: Path) -> None:
    for name, uri in (("local", f"sqlite:///{tmp_path}/local/mlflow.db"), ("server", "http://mlflow:5000")):
        with stage(tmp_path / name, config_of(tmp_path / f"{name}-bucket")) as old:
            (old.folder.path / "mlflow.json").write_text(json.dumps({"uri": uri}))
            old.play(range(2))
        rebuilt = rebuild(str(tmp_path / f"{name}-bucket"), tmp_path / f"{name}-new")
        assert (rebuilt.path / "mlflow.json").exists() == (name == "server")


def test_a_mirror_that_never_answers_costs_a_warning_and_no_checkpoint(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with stage(tmp_path / "run", config_of(blocked / "bucket", keep=1)) as run:
        for step in (2, 4, 6):
            run.ledger.issue(f"rl/{step:08d}", "p", 0)
            asyncio.run(run.keeper.after_step("rl", step, step, with_groups=True))
        assert run.mirror.held("rl") == {6}
        assert sorted(p.name for p in (run.folder.checkpoints / "rl").iterdir()) == ["step-00000006"]
        assert run.mirror.figures()["mirror/lag_steps"] == 6
        began = time.monotonic()
        asyncio.run(run.mirror.settle(patient=False))
        assert time.monotonic() - began < 10
    told = dict(events(tmp_path / "run"))
    assert "cannot" in told["mirror_failing"]
    assert "last commit (rl, step 6) is not in the mirror" in told["mirror_behind"]
    assert "holds nothing" in told["mirror_behind"]
    said = describe(RunFolder(tmp_path / "run"))["text"]
    assert f"mirror {blocked / 'bucket'}: nothing yet; 6 steps behind for " in said
    assert "failing for " in said


def test_the_end_of_a_run_waits_no_longer_than_it_was_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with stage(tmp_path / "run", config_of(tmp_path / "file" / "b", mirror_deadline_s=0.3)) as run:
        asyncio.run(run.mirror.offer("rl", 2))
        began = time.monotonic()
        asyncio.run(run.mirror.settle())
        assert 0.3 <= time.monotonic() - began < 5
        assert not run.mirror.summary()["complete"]


def test_a_process_that_was_replaced_writes_nothing_more_in_the_folder(tmp_path: Path) -> None:
    url = tmp_path / "bucket"
    with stage(tmp_path / "run", config_of(url)) as zombie:
        zombie.play(range(2))
        with Ledger.open(zombie.folder.ledger):  # the successor, in the same folder
            assert soon(lambda: quiet(zombie.folder.mirror)), "a write that was under way may end"
            before = (zombie.folder.mirror.read_bytes(), events(zombie.folder.path))
            asyncio.run(zombie.mirror.offer("rl", 4))
            assert soon(lambda: zombie.mirror.summary()["step"] == 4)
            asyncio.run(zombie.mirror.settle())
            assert (zombie.folder.mirror.read_bytes(), events(zombie.folder.path)) == before


def quiet(file: Path) -> bool:
    before = file.stat().st_mtime_ns
    time.sleep(0.3)
    return file.stat().st_mtime_ns == before


def test_a_run_that_is_continued_elsewhere_ends_here_at_its_next_step(tmp_path: Path) -> None:
    url = tmp_path / "bucket"
    with stage(tmp_path / "old", config_of(url)) as zombie:
        zombie.play(range(2))
        rebuild(str(url), tmp_path / "new")
        asyncio.run(zombie.mirror.offer("rl", 4))
        assert soon(lambda: fenced(zombie))
        with pytest.raises(FencedError, match=r"taken over .*process of|taken over .process \d+"):
            asyncio.run(zombie.keeper.after_step("rl", 3, 3, with_groups=True))
    assert [c.step for c in Mirror(str(url), timeout_s=5).commits()] == [2]


def fenced(run: Stage) -> bool:
    try:
        run.mirror.check()
    except FencedError:
        return True
    return False


def test_a_folder_that_is_continued_offers_what_its_mirror_lacks(tmp_path: Path) -> None:
    url = tmp_path / "bucket"
    with stage(tmp_path / "run", config_of(url)) as first:
        first.play(range(2))
    with stage(tmp_path / "run", config_of(url)) as again:
        assert again.restored().step == 2
        assert again.mirror.figures()["mirror/lag_steps"] == 0
    held = [c.step for c in Mirror(str(url), timeout_s=5).commits()]
    for entry in (url / "log").iterdir():
        entry.unlink()
    (tmp_path / "run" / "mirror.json").unlink()
    with stage(tmp_path / "run", config_of(url)) as again:
        again.restored()
        asyncio.run(again.mirror.settle())
    assert held == [c.step for c in Mirror(str(url), timeout_s=5).commits()] == [2]


def test_an_empty_url_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no commit of a run"):
        rebuild(str(tmp_path / "nothing"), tmp_path / "new")
    with stage(tmp_path / "run", config_of(tmp_path / "bucket")) as run:
        run.play(range(2))
        with pytest.raises(ConfigError, match="already holds a run"):
            rebuild(str(tmp_path / "bucket"), tmp_path / "run")
        with pytest.raises(ConfigError, match="holds the mirror of another run"):
            check_new_mirror(config_of(tmp_path / "bucket"))
        with pytest.raises(ConfigError, match=r"Leave --dir out"):
            commands.resume(str(tmp_path / "run"), [], tmp_path / "new", "", take_over=False, as_json=False)
    check_new_mirror(config_of(tmp_path / "free"))
    check_new_mirror(CheckpointConfig())


def test_a_run_folder_is_on_a_disk(tmp_path: Path) -> None:
    for path in (Path("s3://bucket/run"), Path("file:///tmp/run")):
        for act in (
            lambda path=path: RunFolder.clear(path, fresh=True),
            lambda path=path: RunFolder.existing(path),
        ):
            with pytest.raises(ConfigError, match=r"bucket/run is no folder on a disk|tmp/run is no folder"):
                act()


def test_settings_that_cannot_work_are_refused() -> None:
    for change in ({"mirror_deadline_s": -1.0}, {"mirror_timeout_s": 0.0}):
        with pytest.raises(ConfigError, match=r"checkpoint\.mirror_deadline_s"):
            config_of("s3://b/r", **change).check()
