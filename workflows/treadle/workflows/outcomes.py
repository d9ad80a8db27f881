"""How a run has ended, kept in `run.json` and told by a controller, so that whoever asks later hears the same."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from treadle.platform import errors
from treadle.platform.errors import Interrupted, RoleError, TreadleError
from treadle.platform.records import Outcome
from treadle.platform.tracking import Redactor
from treadle.workflows.folder import RunFolder


def outcome_of(error: BaseException) -> Outcome:
    """What is left of an error where its traceback does not go: of one that nobody foresaw, its name and words."""
    if isinstance(error, TreadleError):
        kind, code = type(error).__name__, error.exit_code
        return Outcome(kind=kind, message=error.message, remedy=error.remedy, exit_code=code)
    return Outcome(
        kind="TreadleError",
        message=f"A defect ended the run: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
        remedy="Its traceback is in the controller's log, RUN/logs/controller.err.",
        exit_code=1,
    )


def interrupted(folder: object) -> Interrupted:
    """Of a run whose process the operator ended."""
    return Interrupted("Stopped by the operator.", f"Continue with: treadle resume {folder}")


def as_json(outcome: Outcome, redactor: Redactor) -> dict[str, Any]:
    """As run.json holds it, without secrets."""
    clean = replace(
        outcome, message=redactor.message(outcome.message), remedy=redactor.message(outcome.remedy)
    )
    return asdict(clean)


def error_of(outcome: Outcome) -> TreadleError:
    """The error again, with its sentence and its exit code."""
    kind = getattr(errors, outcome.kind, TreadleError)
    if not (isinstance(kind, type) and issubclass(kind, TreadleError)):
        kind = TreadleError
    error = kind(outcome.message, outcome.remedy)
    error.exit_code = outcome.exit_code
    return error


def conclude(folder: RunFolder) -> None:
    """Returns for a run that has finished, raises how another one has ended."""
    state = folder.state()
    if state.get("state") == "finished":
        return
    if said := state.get("error"):
        raise error_of(Outcome(**said))
    raise RoleError(f"{folder.path}: nobody runs it.", f"Continue with: treadle resume {folder.path}")
