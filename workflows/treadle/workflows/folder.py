"""The run folder: what lies where, and what it says of itself."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.platform.config import diff_from_defaults, to_yaml
from treadle.platform.errors import ConfigError, DataError

CHAOS = "chaos"
"""What a game day has ordered lies there before its run begins."""
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}(.*)")  # a Path joins the two slashes into one


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths inside a run. The folder holds everything a run needs to continue and a report needs to be drawn.

    config.yaml        the resolved recipe
    config_diff.json   what it changes from the defaults
    run.json           state (running, done, failed, interrupted), attempts, how it was started
    metrics.jsonl      every figure; events.jsonl: what happened besides
    ledger.sqlite      the fate of every prompt group
    checkpoints/       committed states of running stages
    artifacts/<stage>/ what a stage left: a Hugging Face folder and stage.json
    rollouts/          sampled completions with their verdicts, as Parquet
    logs/              the roles' logs
    mirror.json        how far the mirror is; mirror/: what waits to be copied there
    roles.json         what every role is doing, every few seconds
    scale.json         how many workers and verifier processes were asked for last
    failures/          what was known at each failure: roles, stacks
    chaos/             what a game day has ordered, and what has happened; chaos.json: its account
    summary.json, report.html
    """

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def mirror(self) -> Path:
        return self.path / "mirror.json"

    @property
    def tokenizer(self) -> Path:
        return self.path / "artifacts" / "tokenizer"

    def artifact(self, stage: str) -> Path:
        """The Hugging Face folder a stage leaves."""
        return self.path / "artifacts" / stage

    def output(self, stage: str) -> Path:
        """The record of a stage: it is finished when this file exists."""
        return self.path / "artifacts" / f"{stage}.json"

    @classmethod
    def clear(cls, path: Path, *, fresh: bool) -> None:
        """Makes sure that a new run can go there: raises `ConfigError` if something lies there, unless it is a
        run and `fresh` says to remove it."""
        refuse_url(path)
        if cls(path).config.exists():
            if not fresh:
                raise ConfigError(
                    f"{path} already holds a run.",
                    f"Continue it with `treadle resume {path}`, choose another --dir, or replace it with --fresh.",
                )
            shutil.rmtree(path)
        elif path.exists() and any(entry.name != CHAOS for entry in path.iterdir()):
            raise ConfigError(f"{path} is not empty and holds no run.", "Choose another --dir.")

    @classmethod
    def of(cls, path: Path, recipe: object) -> RunFolder:
        """The folder of this recipe's run: a new one, or one that holds a run of the same settings. Raises
        `ConfigError` if it holds another recipe's, or something else."""
        folder, resolved = cls(path), to_yaml(recipe)
        if not folder.config.exists():
            cls.clear(path, fresh=False)
            for part in ("artifacts", "checkpoints", "rollouts", "logs", "work"):
                (path / part).mkdir(parents=True, exist_ok=True)
            changes = [[key, default, value] for key, default, value in diff_from_defaults(recipe)]
            replace_file(path / "config_diff.json", json.dumps(changes, default=str))
            replace_file(folder.config, resolved)
        elif folder.config.read_text().strip() != resolved.strip():
            raise ConfigError(f"{path} holds a run with other settings.", "Choose another folder.")
        return folder

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """Raises `DataError` if no run lies there, `ConfigError` for a URL."""
        refuse_url(path)
        folder = cls(path)
        if not folder.config.exists():
            raise DataError(
                f"{path} holds no run (no config.yaml).", "Name a folder that `treadle run` made."
            )
        return folder

    def state(self) -> dict[str, Any]:
        """The contents of run.json; empty before the first start."""
        return read_json(self.path / "run.json") if (self.path / "run.json").exists() else {}

    def set_state(self, **fields: Any) -> None:
        """Updates run.json atomically."""
        write_json(self.path / "run.json", self.state() | fields)


def refuse_url(path: str | Path) -> None:
    """Raises `ConfigError` for a run folder that is not on a disk: its ledger needs one."""
    if found := _URL.match(str(path)):
        scheme, rest = found.groups()
        raise ConfigError(
            f"{scheme}://{rest} is no folder on a disk, which a run needs.",
            f"Give a local --dir and set checkpoint.mirror={scheme}://{rest}; `treadle resume {scheme}://{rest} "
            "--dir NEW` continues a mirrored run.",
        )


def read_json(path: Path) -> dict[str, Any]:
    """Raises `DataError` naming the file if it is not a JSON object."""
    try:
        value = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(
            f"{path}: {error}.", "The file is part of a run folder; restore it or start a new run."
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object.", "The file is part of a run folder; restore it.")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replaces the file with the object."""
    replace_file(path, json.dumps(value, indent=1))


def replace_file(path: Path, text: str) -> None:
    """Replaces the file atomically, so that a reader never sees half of it."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
