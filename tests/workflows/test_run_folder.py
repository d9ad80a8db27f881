"""The run folder: what may be written where, and what survives half a write."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from treadle.platform.errors import ConfigError, DataError
from treadle.workflows.folder import RunFolder, read_json, replace_file, write_json
from treadle.workflows.recipe import Recipe, load_recipe


def recipe(*overrides: str) -> Recipe:
    return load_recipe("demo", list(overrides))


def test_a_new_folder_holds_the_resolved_recipe_and_what_it_changes(tmp_path: Path) -> None:
    folder = RunFolder.of(tmp_path / "run", recipe("seed=9"))
    assert load_recipe(folder.config) == recipe("seed=9")
    changes = {
        key: (default, value) for key, default, value in read_json_list(folder.path / "config_diff.json")
    }
    assert changes["seed"] == (0, 9)
    assert "learner.step_deadline_s" not in changes


def read_json_list(path: Path) -> list[list[object]]:
    value = json.loads(path.read_text())
    assert isinstance(value, list)
    return value


def test_the_same_recipe_may_come_back_to_its_folder(tmp_path: Path) -> None:
    first = RunFolder.of(tmp_path / "run", recipe())
    first.set_state(state="interrupted", attempts=1)
    again = RunFolder.of(tmp_path / "run", recipe())
    assert again.state() == {"state": "interrupted", "attempts": 1}


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    RunFolder.of(tmp_path / "run", recipe())
    with pytest.raises(ConfigError, match="run with other settings"):
        RunFolder.of(tmp_path / "run", recipe("seed=2"))


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    for fresh in (False, True):
        with pytest.raises(ConfigError, match="not empty and holds no run"):
            RunFolder.clear(tmp_path, fresh=fresh)
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        RunFolder.of(tmp_path, recipe())
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_only_fresh_replaces_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunFolder.of(path, recipe())
    with pytest.raises(ConfigError, match=r"treadle resume .*run"):
        RunFolder.clear(path, fresh=False)
    assert RunFolder(path).config.exists()
    RunFolder.clear(path, fresh=True)
    assert not path.exists()


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    RunFolder.clear(tmp_path, fresh=False)
    assert RunFolder.of(tmp_path, recipe()).config.exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="holds no run"):
            RunFolder.existing(path)


def test_a_reader_never_sees_half_of_a_replaced_file(tmp_path: Path) -> None:
    path, stop = tmp_path / "state.json", threading.Event()
    write_json(path, {"n": -1, "filling": ""})
    torn: list[object] = []

    def read() -> None:
        while not stop.is_set():
            value = read_json(path)
            if len(str(value["filling"])) != max(0, int(value["n"])):
                torn.append(value)

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(30):
        write_json(path, {"n": n * 500, "filling": "x" * n * 500})
    stop.set()
    reader.join(timeout=30)
    assert not torn


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    replace_file(path, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "new \ud800")
    assert path.read_text() == "old\n"


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "nonsense"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(DataError, match=r"run\.json"):
        RunFolder(tmp_path).state()


def test_state_is_added_to_and_never_lost(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.set_state(state="running", pid=os.getpid())
    folder.set_state(state="done")
    assert folder.state() == {"state": "done", "pid": os.getpid()}
