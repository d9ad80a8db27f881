"""What the commands that only look at a run folder do. Their results are like those of `commands`, whose heavy
imports (a recipe knows objectives, and these torch) they do without: `treadle status` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from treadle.platform.errors import ConfigError, DataError
from treadle.workflows.folder import RunFolder
from treadle.workflows.outputs import outputs_of
from treadle.workflows.progress import describe

Result = dict[str, Any]


def status(path: Path) -> Result:
    """Where a run stands, read from its folder alone."""
    return describe(RunFolder.existing(path))


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
