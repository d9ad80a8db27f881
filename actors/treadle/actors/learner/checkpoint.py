"""The learner's checkpoint: whole fp32 state by parameter name, for any backend, ZeRO stage and rank count.

A folder (fsspec URL) holds `learner.json` (step, updates, which file has which parameter) and safetensors
files of at most `SHARD_BYTES`, with `weight/<name>`, `exp_avg/<name>` and `exp_avg_sq/<name>`; with a KL term
also the reference policy's weights. Nothing here commits: the checkpoint's marker does, once all its files
are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from treadle.actors.learner.backend import ParameterState
from treadle.platform.errors import CheckpointError, StorageError
from treadle.platform.failpoints import failpoint
from treadle.platform.records import Json
from treadle.platform.storage import Store, open_store

FORMAT = 1
INDEX = "learner.json"
SHARD_BYTES = 2**30
STATE = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What `learner.json` says. `step` is the version held, `reference_step` that of the reference policy
    (-1 without one); `files` maps tensor keys to file names."""

    step: int
    updates: int
    reference_step: int
    files: Mapping[str, str]
    extra: Mapping[str, Json]


def write(
    folder: str,
    state: Iterable[tuple[str, ParameterState]],
    reference: Iterable[tuple[str, Tensor]],
    *,
    step: int,
    updates: int,
    reference_step: int,
    extra: Mapping[str, Json],
    writer: bool,
) -> None:
    """Writes the checkpoint. All ranks walk `state`, since gathering is collective; only the `writer` keeps
    and writes it, a shard at a time. The index is written last."""
    store = open_store(folder)
    files: dict[str, str] = {}
    tensors = ((f"{part}/{name}", getattr(s, part)) for name, s in state for part in STATE)
    for number, shard in enumerate(_shards(tensors)):
        if writer:
            _write_shard(store, f"optimizer-{number:05d}.safetensors", shard, files)
            failpoint("learner.mid_save")
    named = ((f"reference/{name}", tensor) for name, tensor in reference)
    for number, shard in enumerate(_shards(named) if writer else ()):
        _write_shard(store, f"reference-{number:05d}.safetensors", shard, files)
    if writer:
        index = {
            "format": FORMAT,
            "step": step,
            "updates": updates,
            "reference_step": reference_step,
            "files": files,
            "extra": dict(extra),
        }
        store.write_bytes(INDEX, json.dumps(index, indent=1).encode())


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for key, tensor in tensors:
        grown = size + tensor.numel() * tensor.element_size()
        if shard and grown > SHARD_BYTES:
            yield shard
            shard, grown = {}, grown - size
        shard[key] = tensor.contiguous()
        size = grown
    if shard:
        yield shard


def _write_shard(store: Store, name: str, shard: dict[str, Tensor], files: dict[str, str]) -> None:
    store.write_bytes(name, safetensors.torch.save(shard))
    files.update(dict.fromkeys(shard, name))


class Reader:
    """A checkpoint's tensors by key, one file in memory at a time.

    Raises CheckpointError for an unknown format, a missing file or a missing tensor.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._store = open_store(folder)
        self._open: tuple[str, dict[str, Tensor]] = ("", {})
        raw = _parsed(folder, self._read(INDEX))
        if raw.get("format") != FORMAT:
            raise CheckpointError(
                f"Checkpoint {folder}: learner format {raw.get('format')}, this version reads {FORMAT}.",
                "Load it with the version of Treadle that wrote it.",
            )
        self.index = Index(
            step=raw["step"],
            updates=raw["updates"],
            reference_step=raw["reference_step"],
            files=raw["files"],
            extra=raw["extra"],
        )

    def state(self, name: str) -> ParameterState:
        weight, exp_avg, exp_avg_sq = (self._tensor(f"{part}/{name}") for part in STATE)
        return ParameterState(weight=weight, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)

    def reference(self) -> Iterator[tuple[str, Tensor]]:
        for key in self.index.files:
            if key.startswith("reference/"):
                yield key.removeprefix("reference/"), self._tensor(key)

    def check_names(self, names: Iterable[str]) -> None:
        """Raises CheckpointError unless the checkpoint holds exactly these parameters."""
        held = {key.removeprefix("weight/") for key in self.index.files if key.startswith("weight/")}
        wanted = set(names)
        if held != wanted:
            odd = sorted(held ^ wanted)
            raise CheckpointError(
                f"Checkpoint {self._folder} is of another model: {len(odd)} names differ, e.g. {odd[0]}.",
                "Resume with the model the run was started with.",
            )

    def _tensor(self, key: str) -> Tensor:
        file = self.index.files.get(key)
        if file is None:
            raise CheckpointError(f"Checkpoint {self._folder} has no tensor {key}.")
        if self._open[0] != file:
            self._open = (file, safetensors.torch.load(self._read(file)))
        return self._open[1][key]

    def _read(self, name: str) -> bytes:
        try:
            return self._store.read_bytes(name)
        except StorageError as error:
            raise CheckpointError(
                f"Checkpoint {self._folder}: {error.message}", "Resume from another checkpoint of the run."
            ) from error


def _parsed(folder: str, data: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"Checkpoint {folder}: {INDEX} is damaged ({error}).") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"Checkpoint {folder}: {INDEX} is damaged.")
    return raw
