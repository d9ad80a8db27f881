"""What the commands for a run that goes on by itself do. Like `inspection`, without the heavy imports of `commands`: a
client is back within seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from treadle.platform.errors import DeadlineError
from treadle.workflows.folder import RunFolder, read_json
from treadle.workflows.onlooking import stop_run
from treadle.workflows.outputs import closing_text
from treadle.workflows.progress import describe

Result = dict[str, Any]


def attach(path: Path, address: str, *, as_json: bool) -> Result:
    """Follows a run to its end, as if it had been started here."""
    from treadle.workflows import detached

    detached.attach(path, address, quiet=as_json)
    folder = RunFolder(path)
    return {**read_json(folder.summary), "text": closing_text(folder)}


def stop(path: Path, deadline_s: float) -> Result:
    """Ends a run after a commit, and a controller that does not react by force."""
    folder = RunFolder.existing(path)
    try:
        said = stop_run(folder, deadline_s)
    except DeadlineError as error:
        if not folder.state().get("controller"):
            raise
        from treadle.workflows.detached import kill_controller

        kill_controller(folder)
        said = f"{error.message} Its controller was killed. Continue with: treadle resume {path}"
    return {"folder": str(path), "state": describe(folder)["state"], "text": said}
