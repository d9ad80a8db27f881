"""What the commands that start something do. Each returns a result that prints as JSON, or as its `text`."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from treadle.platform.config import to_yaml
from treadle.platform.errors import ConfigError, Interrupted
from treadle.workflows.data.tokenization import load_tokenizer
from treadle.workflows.elastic import forget
from treadle.workflows.folder import RunFolder, read_json, refuse_url, replace_file
from treadle.workflows.inputs import build_inputs
from treadle.workflows.outputs import closing_text
from treadle.workflows.progress import holder, stopped
from treadle.workflows.recipe import Recipe, load_recipe, recipe_names

Result = dict[str, Any]


def run(
    source: str,
    overrides: Sequence[str],
    folder: Path | None,
    address: str,
    *,
    fresh: bool,
    dry_run: bool,
    as_json: bool,
    detach: bool = False,
) -> Result:
    """Checks the recipe and its data, then runs it. Nothing is started, and no folder made, if a check fails."""
    recipe = addressed(load_recipe(source, overrides), address)
    if dry_run:
        skipped = check_inputs(recipe)
        text = to_yaml(recipe)
        return {"recipe": recipe.name, "stages": list(recipe.stages), "skipped_rows": skipped, "text": text}
    target = folder or Path("runs") / recipe.name
    if fresh and (holds := holder(RunFolder(target).state())):
        raise ConfigError(
            f"{target} is being run by {holds}.", f"End it first, with `treadle stop {target}`."
        )
    RunFolder.clear(target, fresh=fresh)
    if detach:
        check_inputs(recipe)  # what is wrong with the data is said before anything is shipped
    return _play(recipe, target, as_json, detach=detach)


def resume(
    source: str,
    overrides: Sequence[str],
    folder: Path | None,
    address: str,
    *,
    take_over: bool,
    as_json: bool,
    detach: bool = False,
) -> Result:
    """Continues a run from its folder, or from its mirror in the new folder `folder`. Whoever ran it before can write
    nothing more from then on. `overrides` may say where and with how many processes, not what is trained."""
    path = Path(source)
    if "://" in source or folder is not None:
        path = _rebuilt(source, folder, address)
    target = RunFolder.existing(path)
    recipe = _resized(target.config, overrides)
    state = target.state()
    _refuse_if_held(target, take_over=take_over)
    if state.get("state") == "finished" and target.summary.exists():
        return {**read_json(target.summary), "text": closing_text(target)}
    if address or overrides:
        forget(path)
        recipe = addressed(recipe, address)
        replace_file(target.config, to_yaml(recipe))
    return _play(recipe, path, as_json, detach=detach, continued=True, take_over=take_over)


def _refuse_if_held(target: RunFolder, *, take_over: bool) -> None:
    """Raises `ConfigError` where somebody runs the run, unless they are to be replaced. A detached controller that is
    frozen or to be replaced is ended: what belongs to it would stay in the new one's way."""
    state = target.state()
    holds = holder(state)
    if state.get("state") == "running" and state.get("controller"):
        if holds or stopped(int(state.get("pid", 0))):
            from treadle.workflows.detached import release

            release(target.path, take_over=take_over)
    elif holds and not take_over:
        raise ConfigError(
            f"{target.path} is being run by {holds}.",
            "Stop that process first (`treadle stop`), or continue here with --take-over: it can write nothing more "
            "then.",
        )


def _resized(config: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe of a run with other settings where they are no part of what comes out."""
    before = load_recipe(config)
    if not overrides:
        return before
    after = load_recipe(config, overrides)
    fixed, wanted = decides(before), decides(after)
    if changed := [key for key in {**fixed, **wanted} if fixed.get(key) != wanted.get(key)]:
        raise ConfigError(
            f"{', '.join(changed)} cannot change when a run is continued: it decides what is trained.",
            "Change only roles (learner.ranks, rollout.workers, ...), cluster, checkpoint, tracking and recovery, or "
            "start a new run.",
        )
    return after


def decides(recipe: Recipe) -> Result:
    """The settings that decide what is trained, by name."""
    stages = {f"stages.{name}": stage for name, stage in recipe.stages.items()}
    fixed = {"name": recipe.name, "seed": recipe.seed, "tokenizer": recipe.tokenizer}
    return {**fixed, "verify.parts": recipe.verify.parts, **stages}


def _rebuilt(url: str, folder: Path | None, address: str) -> Path:
    from treadle.workflows.mirroring import rebuild

    if RunFolder(Path(url)).config.exists():
        raise ConfigError(
            f"--dir {folder} goes with a mirror; {url} is a run folder.",
            "Leave --dir out: a run is continued in its own folder.",
        )
    return rebuild(url, folder or Path("runs") / url.rstrip("/").rpartition("/")[2], address).path


def evaluate_model(model: Path, source: str, overrides: Sequence[str], address: str) -> Result:
    """Evaluates any model folder on a recipe's held-out prompts."""
    from treadle.workflows.launch import evaluate_folder

    found = asyncio.run(evaluate_folder(addressed(load_recipe(source, overrides), address), model))
    return {"model": str(model), **found.as_json(), "text": found.line()}


def list_recipes() -> Result:
    """The shipped recipes."""
    names = recipe_names()
    width = max(len(name) for name in names)
    return {"recipes": names, "text": "\n".join(f"{name:<{width}}  {about}" for name, about in names.items())}


def submit(
    source: str, overrides: Sequence[str], address: str, folder: str, *, wait: bool, as_json: bool
) -> Result:
    """Runs the recipe as a Ray job on the cluster behind `address`."""
    from treadle.cluster.submit import submit_recipe

    refuse_url(folder)
    recipe = load_recipe(source, overrides)
    check_inputs(recipe)
    return submit_recipe(
        to_yaml(recipe), name=recipe.name, address=address, folder=folder, wait=wait, quiet=as_json
    )


def addressed(recipe: Recipe, address: str) -> Recipe:
    """The recipe on the cluster at `address`, if one is named."""
    return replace(recipe, cluster=replace(recipe.cluster, address=address)) if address else recipe


def check_inputs(recipe: Recipe) -> dict[str, int]:
    """Builds every stage's data as a run would. Returns how many broken rows each leaves out."""
    with tempfile.TemporaryDirectory(prefix="treadle-") as scratch:
        folder = recipe.tokenizer.write(Path(scratch) / "tokenizer")
        inputs = build_inputs(recipe, load_tokenizer(str(folder)))
    return {name: stage.skipped for name, stage in inputs.items() if stage.skipped}


def _play(
    recipe: Recipe,
    path: Path,
    as_json: bool,
    *,
    detach: bool = False,
    continued: bool = False,
    take_over: bool = False,
) -> Result:
    if detach:
        from treadle.workflows.detached import run_detached

        run_detached(recipe, path, quiet=as_json, continued=continued, take_over=take_over)
        return {**read_json(RunFolder(path).summary), "text": closing_text(RunFolder(path))}
    from treadle.workflows.launch import play

    try:
        summary = asyncio.run(play(recipe, path, quiet=as_json))
    except KeyboardInterrupt:
        remedy = f"Continue with: treadle resume {path}" if RunFolder(path).config.exists() else ""
        raise Interrupted("Stopped by the operator.", remedy) from None
    return {**summary, "text": closing_text(RunFolder(path))}
