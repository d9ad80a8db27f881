"""A run's mirror: every commit is copied behind a URL while the run goes on, and a run is rebuilt from there.

What is copied is what a machine that has never seen the run needs: the checkpoint, the ledger, the resolved recipe, the
figures and sampled rollouts so far, what finished stages left, and the tokenizer. Data and models that the recipe names
by path or URL are not: they must be reachable where the run goes on.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from treadle.platform import metric_names as names
from treadle.platform.checkpoints import MANIFEST, MARKER, manifest_of
from treadle.platform.config import to_yaml
from treadle.platform.errors import DataError, StorageError, TreadleError
from treadle.platform.ledger import Ledger
from treadle.platform.mirror import Mirror, new_id
from treadle.platform.mirror_reader import fetch_newest
from treadle.platform.mirror_uploader import FAILING, RECOVERED, SKIPPED, MirrorUploader, Offer, Progress
from treadle.platform.mirror_writer import MirrorWriter, Source
from treadle.platform.records import Json
from treadle.platform.tracking import RunTracker
from treadle.workflows.folder import RunFolder, read_json, replace_file, write_json
from treadle.workflows.outputs import outputs_of
from treadle.workflows.recipe import load_recipe
from treadle.workflows.saving import CheckpointConfig

PASSED_OVER, FETCHED, BEHIND = "mirror_passed_over", "mirror_fetched", "mirror_behind"
SCRATCH = "mirror"
FEED_STATE = "mlflow.json"
CHANGING = ("config.yaml", "config_diff.json", "run.json", "chains.json", FEED_STATE)
SPOOLS = ("metrics.jsonl", "events.jsonl")
LOOK_S = 0.05


class RunMirror:
    """The mirror of one attempt of a run; see `mirrored`. Only `offer` touches the disk, nothing the network: that is
    the uploader's, in a thread of its own."""

    def __init__(
        self, config: CheckpointConfig, folder: RunFolder, ledger: Ledger, tracker: RunTracker
    ) -> None:
        self._config, self._folder, self._ledger, self._tracker = config, folder, ledger, tracker
        url, said = config.mirror.rstrip("/"), read_state(folder)
        self._said: dict[str, Any] = (
            said if said.get("url") == url else {"url": url, "id": said.get("id") or new_id()}
        )
        known = progress_of(self._said)
        self._last, self._made = (known.stage, known.step), 0
        self._lock = threading.Lock()
        self._settled = self._closed = False
        self._uploader = MirrorUploader(
            self._open_writer,
            keep=config.keep,
            tell=self._tell,
            changed=self._changed,
            known=replace(known, behind_since=0.0, lag_steps=0, failing_since=0.0, error=""),
        )

    def start(self) -> None:
        """Tells what a rebuilding fetched and passed over, and claims the mirror in the background."""
        for line in self._said.pop("passed_over", []):
            self._tell(PASSED_OVER, {"message": line})
        if fetched := self._said.pop("fetched", None):
            self._tell(FETCHED, fetched)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._changed()  # the folder's id is on the disk before the mirror knows it
        self._uploader.start()

    def check(self) -> None:
        """Raises `FencedError` once it is known that another process has taken the run over, `ConfigError` that the
        mirror is another run's, `DataError` that this version cannot read it."""
        self._uploader.check()

    def holds(self, stage: str, step: int) -> bool:
        """Whether that commit is the newest in the mirror."""
        return (self._uploader.progress.stage, self._uploader.progress.step) == (stage, step)

    def held(self, stage: str) -> frozenset[int]:
        """Steps whose checkpoints must stay, because they are not copied yet."""
        return self._uploader.held(stage)

    async def offer(self, stage: str, step: int, checkpoint: str | None = None) -> None:
        """Queues the run as it is now, at `step` of a stage: with a committed checkpoint, or (None) with the stage
        finished. Costs a copy of the ledger on the disk. A disk that refuses is the mirror's misfortune, and told."""
        last_stage, last_step = self._last
        self._made += max(0, step - last_step) if stage == last_stage else step
        self._last = (stage, step)
        made, now = self._made, time.time()
        ledger = self._scratch / f"ledger-{time.monotonic_ns()}.sqlite"
        try:
            sources = await asyncio.to_thread(self._staged, ledger, stage, checkpoint)
        except (OSError, StorageError) as error:
            ledger.unlink(missing_ok=True)
            self._tell(SKIPPED, {"commit": f"{stage}, step {step}", "message": str(error)})
            return
        self._uploader.offer(
            Offer(stage=stage, step=step, made=made, unix_s=now, sources=sources, scratch=(ledger,))
        )

    def figures(self) -> dict[str, float]:
        """The mirror's metrics, for a step."""
        progress = self._uploader.progress
        return {
            names.MIRROR_NEWEST_STEP: float(max(0, progress.step)),
            names.MIRROR_LAG_STEPS: float(progress.lag_steps),
            names.MIRROR_LAG_S: progress.lag_s(time.time()),
            names.MIRROR_SKIPPED: float(progress.skipped),
        }

    async def settle(self, *, patient: bool = True) -> None:
        """Waits once for the newest commit to arrive, at most `checkpoint.mirror_deadline_s`; not `patient`, only while
        nothing fails. Says so where it did not arrive."""
        if self._settled:
            return
        self._settled = True
        deadline = time.monotonic() + self._config.mirror_deadline_s
        self._uploader.hurry()
        while not self._uploader.over and time.monotonic() < deadline:
            if self._uploader.progress.error and not patient:
                break
            await asyncio.sleep(LOOK_S)
        if not self._complete:
            self._tell(BEHIND, {"message": self._behind()})

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says of it."""
        progress = self._uploader.progress
        return {
            "url": self._said["url"],
            "complete": self._complete,
            "stage": progress.stage,
            "step": progress.step,
            "commits": progress.commits,
            "skipped": progress.skipped,
            "failures": progress.failures,
            "error": progress.error,
        }

    def close(self) -> None:
        """Ends the copying. A request that outlives it writes nothing more in the run folder."""
        self._uploader.close()
        with self._lock:
            self._closed = True

    @property
    def _complete(self) -> bool:
        """Whether the run's last commit is in the mirror; one that the disk refused was never offered."""
        return self._uploader.arrived and self.holds(*self._last)

    def _behind(self) -> str:
        progress, (stage, step) = self._uploader.progress, self._last
        newest = f"{progress.stage}, step {progress.step}" if progress.stage else "nothing"
        why = progress.error or f"it did not arrive within {self._config.mirror_deadline_s:g} s"
        return (
            f"the run's last commit ({stage}, step {step}) is not in the mirror {self._said['url']}, which holds "
            f"{newest}: {why}"
        )

    @property
    def _scratch(self) -> Path:
        return self._folder.path / SCRATCH

    def _open_writer(self) -> MirrorWriter:
        mirror = Mirror(self._said["url"], timeout_s=self._config.mirror_timeout_s)
        return MirrorWriter(mirror, mirror.claim(self._said["id"], this_process()))

    def _staged(self, ledger: Path, stage: str, checkpoint: str | None) -> tuple[Source, ...]:
        """What to upload, with a copy of the ledger at that path."""
        ledger.parent.mkdir(exist_ok=True)
        self._ledger.snapshot(ledger)
        copy = Source(name=self._folder.ledger.name, path=ledger, size=ledger.stat().st_size)
        shards = _checkpoint(self._folder.path, Path(checkpoint)) if checkpoint else []
        return (*shards, copy, *_rest(self._folder, stage))

    def _tell(self, kind: str, told: Mapping[str, Json]) -> None:
        with self._lock:
            if not self._may_write():
                return
            self._tracker.event(kind, {"url": self._said["url"], **told})
            if kind == FAILING:
                self._tracker.say(f"warning: the mirror fails, the run goes on: {told['message']}")
            elif kind == RECOVERED:
                self._tracker.say(f"the mirror takes the run's commits again, after {told['seconds']} s")
            elif kind == FETCHED:
                self._tracker.say(f"continued from {self._said['url']}: {told['message']}")
            elif kind in (PASSED_OVER, BEHIND):
                self._tracker.say(f"warning: {told['message']}")

    def _changed(self) -> None:
        with self._lock, suppress(OSError):  # the uploader's way must not end at a full disk
            if self._may_write():
                write_json(self._folder.mirror, {**self._said, **asdict(self._uploader.progress)})

    def _may_write(self) -> bool:
        """The folder may belong to another process by now."""
        if self._closed:
            return False
        try:
            self._ledger.check_held()
        except TreadleError:
            return False
        return True


@contextmanager
def mirrored(
    config: CheckpointConfig, folder: RunFolder, ledger: Ledger, tracker: RunTracker
) -> Iterator[RunMirror | None]:
    """The run's mirror while the block lasts, or None where none is set."""
    if not config.mirror:
        yield None
        return
    mirror = RunMirror(config, folder, ledger, tracker)
    mirror.start()
    try:
        yield mirror
    finally:
        mirror.close()


def check_new_mirror(config: CheckpointConfig) -> None:
    """For a run that is about to be made. Raises `ConfigError` where another run is mirrored to the URL, and
    `StorageError` where it does not answer: a mirror that never worked should be known before a week of training."""
    if config.mirror:
        Mirror(config.mirror, timeout_s=config.mirror_timeout_s).check_free()


def rebuild(url: str, path: Path, address: str = "") -> RunFolder:
    """Makes a run folder from the newest valid commit of a mirror, and takes the mirror over: whoever wrote to it
    before can commit nothing more. Its recipe names the mirror as it is named here, and the cluster at
    `address` (empty: an embedded one): the old one may be gone. Raises `DataError` where there is
    nothing to continue from or another version of Treadle wrote the mirror, `ConfigError` where something lies at
    `path`, and `StorageError`."""
    RunFolder.clear(path, fresh=False)
    mirror = Mirror(url, timeout_s=CheckpointConfig.mirror_timeout_s)
    if not mirror.commits():
        raise DataError(
            f"{mirror.url} holds no commit of a run.", "Check the URL: it is what checkpoint.mirror named."
        )
    began, id = time.monotonic(), new_id()
    mirror.claim(id, this_process(), take_over=True)
    draft = RunFolder(path.absolute().with_name(f".{path.name}.partial"))
    fetched = fetch_newest(mirror, draft.path)
    commit, seconds = fetched.commit, round(time.monotonic() - began, 3)
    recipe = load_recipe(draft.config)
    recipe = replace(
        recipe,
        checkpoint=replace(recipe.checkpoint, mirror=mirror.url),
        cluster=replace(recipe.cluster, address=address),
    )
    replace_file(draft.config, to_yaml(recipe))
    draft.set_state(state="interrupted", pid=0, host="", resumed_from=mirror.url)
    for part in ("artifacts", "checkpoints", "rollouts", "logs", "work"):
        (draft.path / part).mkdir(exist_ok=True)
    size = f"{fetched.bytes / 1e6:.1f} MB"
    told = {
        "message": f"{commit}, {size} fetched and verified in {seconds:.1f} s",
        "step": commit.step,
        "bytes": fetched.bytes,
        "seconds": seconds,
    }
    said = {"url": mirror.url, "id": id, "passed_over": list(fetched.passed_over), "fetched": told}
    held = Progress(stage=commit.stage, step=commit.step, mirrored_unix_s=commit.unix_s)
    write_json(draft.mirror, {**said, **asdict(held)})
    draft.path.replace(path)
    return RunFolder(path)


def this_process() -> str:
    """For people who ask who owns a mirror."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def read_state(folder: RunFolder) -> dict[str, Any]:
    """`mirror.json`, or nothing."""
    return read_json(folder.mirror) if folder.mirror.exists() else {}


def progress_of(said: Mapping[str, Any]) -> Progress:
    """The progress that a `mirror.json` holds."""
    return Progress(**{f.name: said[f.name] for f in fields(Progress) if f.name in said})


def _checkpoint(root: Path, folder: Path) -> list[Source]:
    """The shards with the checksums that the commit gave them; the manifest and the marker last."""
    inside = folder.relative_to(root.absolute())
    shards = [
        Source(name=str(inside / name), path=folder / name, size=entry["bytes"], crc32=entry["crc32"])
        for name, entry in manifest_of(folder).items()
    ]
    manifest = (folder / MANIFEST).read_bytes()
    return [
        *shards,
        Source(name=str(inside / MANIFEST), data=manifest, size=len(manifest)),
        Source(name=str(inside / MARKER), size=0),
    ]


def _rest(folder: RunFolder, stage: str) -> Iterator[Source]:
    """All else that another machine needs. What changes is read now; spools only grow, so their present length is what
    counts. MLflow's offsets are read before the spools' lengths and so never lie behind them."""
    changing = [*CHANGING, *(f"failures/{file.name}" for file in (folder.path / "failures").glob("*.json"))]
    outputs = outputs_of(folder)
    for name in [*changing, *(f"artifacts/{done}.json" for done in outputs)]:
        if (folder.path / name).exists() and not _is_local_feed(folder, name):
            data = (folder.path / name).read_bytes()
            yield Source(name=name, data=data, size=len(data))
    for name in SPOOLS:
        yield Source(name=name, path=folder.path / name, size=(folder.path / name).stat().st_size)
    lasting = [folder.tokenizer, *(Path(output.model) for output in outputs.values() if output.model)]
    lasting += [folder.path / "work" / stage] if stage not in outputs else []
    for part in lasting:
        yield from _lasting(folder.path, part)
    yield from _lasting(folder.path, folder.path / "rollouts", expendable=True)


def _is_local_feed(folder: RunFolder, name: str) -> bool:
    """Whether this is how far an MLflow database inside the folder is, which stays behind: a new one is fed anew."""
    return name == FEED_STATE and str(folder.path.resolve()) in read_json(folder.path / name).get("uri", "")


def _lasting(root: Path, part: Path, *, expendable: bool = False) -> Iterator[Source]:
    if not part.is_relative_to(root):
        return
    for file in sorted(part.rglob("*")):
        if file.is_file() and not file.name.startswith("."):  # drafts of files begin with a dot
            name = str(file.relative_to(root))
            size = file.stat().st_size
            yield Source(name=name, path=file, size=size, lasting=True, expendable=expendable)
