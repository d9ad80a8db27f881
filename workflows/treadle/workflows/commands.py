"""What the commands of the command line do. Each returns a result that prints as JSON, or as its `text`."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from treadle.platform.config import to_yaml
from treadle.platform.errors import ConfigError, DataError
from treadle.workflows.data.tokenization import load_tokenizer
from treadle.workflows.folder import RunFolder, replace_file
from treadle.workflows.inputs import build_inputs
from treadle.workflows.outputs import outputs_of
from treadle.workflows.progress import alive, describe
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
) -> Result:
    """Checks the recipe and its data, then runs it. Nothing is started, and no folder made, if a check fails."""
    recipe = _addressed(load_recipe(source, overrides), address)
    if dry_run:
        skipped = _check_inputs(recipe)
        text = to_yaml(recipe)
        return {"recipe": recipe.name, "stages": list(recipe.stages), "skipped_rows": skipped, "text": text}
    target = folder or Path("runs") / recipe.name
    RunFolder.clear(target, fresh=fresh)
    return _play(recipe, target, as_json)


def resume(path: Path, address: str, *, as_json: bool) -> Result:
    """Continues a run from its folder alone."""
    target = RunFolder.existing(path)
    recipe = load_recipe(target.config)
    state = target.state()
    if state.get("state") == "running" and alive(int(state.get("pid", 0))):
        raise ConfigError(f"{path} is being run by process {state['pid']}.", "Stop that process first.")
    if address:
        recipe = _addressed(recipe, address)
        replace_file(target.config, to_yaml(recipe))
    return _play(recipe, path, as_json)


def status(path: Path) -> Result:
    """Where a run stands, read from its folder alone."""
    return describe(RunFolder.existing(path))


def evaluate_model(model: Path, source: str, overrides: Sequence[str], address: str) -> Result:
    """Evaluates any model folder on a recipe's held-out prompts."""
    from treadle.workflows.launch import evaluate_folder

    found = asyncio.run(evaluate_folder(_addressed(load_recipe(source, overrides), address), model))
    return {"model": str(model), **found.as_json(), "text": found.line()}


def export(path: Path, stage: str, to: Path | None) -> Result:
    """Writes a finished stage's model somewhere, checked."""
    from treadle.workflows.export import export_model

    folder = RunFolder.existing(path)
    with_model = {name: o for name, o in outputs_of(folder).items() if o.model and o.kind != "export"}
    if not with_model:
        raise DataError(
            f"{path} has no finished stage with a model.", f"Continue it with `treadle resume {path}`."
        )
    chosen = stage or list(with_model)[-1]
    if chosen not in with_model:
        raise ConfigError(
            f"{path} has no finished stage {chosen}.", f"Choose one of: {', '.join(with_model)}."
        )
    target = to or folder.path / "export" / chosen
    export_model(folder.artifact(chosen), target, with_model[chosen].digest)
    return {
        "stage": chosen,
        "model": str(target),
        "digest": with_model[chosen].digest,
        "text": f"{chosen} → {target}",
    }


def report(path: Path) -> Result:
    """Draws the report again from the run folder."""
    from treadle.dashboards.report import write_report

    page = write_report(RunFolder.existing(path).path)
    return {"report": str(page), "text": str(page)}


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

    recipe = load_recipe(source, overrides)
    _check_inputs(recipe)
    return submit_recipe(
        to_yaml(recipe), name=recipe.name, address=address, folder=folder, wait=wait, quiet=as_json
    )


def _addressed(recipe: Recipe, address: str) -> Recipe:
    return replace(recipe, cluster=replace(recipe.cluster, address=address)) if address else recipe


def _check_inputs(recipe: Recipe) -> dict[str, int]:
    """Builds every stage's data as a run would. Returns how many broken rows each leaves out."""
    with tempfile.TemporaryDirectory(prefix="treadle-") as scratch:
        folder = recipe.tokenizer.write(Path(scratch) / "tokenizer")
        inputs = build_inputs(recipe, load_tokenizer(str(folder)))
    return {name: stage.skipped for name, stage in inputs.items() if stage.skipped}


def _play(recipe: Recipe, path: Path, as_json: bool) -> Result:
    from treadle.workflows.launch import play

    summary = asyncio.run(play(recipe, path, quiet=as_json))
    outputs = outputs_of(RunFolder(path)).items()
    lines = [f"{name:>10}  {output.evaluation.line()}" for name, output in outputs if output.evaluation]
    lines.append(f"{'report':>10}  {path / 'report.html'}")
    return {**summary, "text": "\n".join(lines)}
