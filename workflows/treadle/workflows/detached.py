"""Runs that no client owns: their controller is a detached actor, which clients start, follow, find again and stop.

A client may be killed at any moment. It reads what the run writes into its folder, and asks the controller, found by
its name, only whether it lives and how it ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.actors.controller import Controller, find_controller, start_controller
from treadle.actors.deaths import death_at, death_of
from treadle.cluster.environment import given_token, prepare_environment
from treadle.cluster.reach import check_cluster
from treadle.cluster.session import ClusterConfig, open_session
from treadle.cluster.wheel import shipped
from treadle.platform.errors import (
    ClusterError,
    ConfigError,
    DataError,
    DeadlineError,
    Interrupted,
    RoleError,
    TreadleError,
)
from treadle.platform.records import Outcome
from treadle.platform.tracking.follow import Follower
from treadle.workflows.folder import RunFolder
from treadle.workflows.onlooking import follow_process
from treadle.workflows.outcomes import conclude, error_of, outcome_of

if TYPE_CHECKING:
    from treadle.workflows.recipe import Recipe

KNOCK_S, KNOCK_EVERY_S, KNOCKS = 5.0, 8.0, 2
"""A silent controller's cluster is looked for; a head that is being replaced gets a second chance."""
FROZEN_S = 10.0
"""How long a controller that is in the way is given to answer."""


def controller_name(path: Path) -> str:
    """The name of a run's controller: of its folder, as all nodes see it."""
    path = path.resolve()
    return f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def run_detached(
    recipe: Recipe, path: Path, *, quiet: bool, continued: bool, take_over: bool = False
) -> None:
    """Starts a controller for the run in the folder `path` and follows it to its end, whose error is raised.

    `continued` says that the folder must hold a run already. Raises `ConfigError` where another controller runs it and
    `take_over` is off.
    """
    if not recipe.cluster.address:
        raise ConfigError(
            "--detach needs a cluster that goes on when this process ends; an embedded Ray does not.",
            "Add --address host:port of a running cluster.",
        )
    path, name = path.resolve(), controller_name(path)
    follower = Follower(path, _stream(quiet))
    follower.catch_up(show=False)
    with tempfile.TemporaryDirectory(prefix="treadle-") as scratch:
        code = shipped(Path(scratch))
        with open_session(recipe.cluster, runtime_env=code) as session:
            if (old := find_controller(name)) is not None:
                make_room(path, old, take_over=take_over)
            work = partial(_play, recipe, path, os.getcwd(), continued)
            try:
                controller = start_controller(name, session.gcs_address, work)
            except KeyboardInterrupt:
                raise _left(path) from None
            _say(
                quiet,
                f"controller {name} runs it on the cluster at {session.gcs_address}; Ctrl-C leaves it running",
            )
            _follow(path, controller, follower)


def attach(path: Path, address: str, *, quiet: bool) -> None:
    """Follows the run in a folder to its end, whoever runs it; its error is raised. `address` is the cluster's, where
    the folder does not say it or another one is to be asked."""
    folder = RunFolder(path.resolve())
    state = folder.state()
    where = address or _address(folder)
    running = state.get("state") == "running"
    if running and not state.get("controller"):
        follow_process(folder, _stream(quiet))
    elif where and (running or address):
        with open_session(ClusterConfig(address=where, token_file=_token_file(folder))):
            _attach(folder, where, quiet)
    else:
        RunFolder.existing(folder.path)
        conclude(folder)


def make_room(path: Path, old: Controller, *, take_over: bool) -> None:
    """Ends a controller whose work is over, that is frozen, or that is to be replaced. Raises `ConfigError` for one
    that runs the run and may go on."""
    try:
        busy = not old.about(FROZEN_S)["over"]
    except RoleError:
        busy = False
    if busy and not take_over:
        raise ConfigError(
            f"{path} is being run by controller {old.name}.",
            f"Follow it with `treadle attach {path}`, end it with `treadle stop {path}`, or continue here with "
            "--take-over: it is killed then.",
        )
    old.kill()


def release(path: Path, *, take_over: bool) -> None:
    """Like `make_room`, for whichever controller the folder names, and from a process that has no Ray yet."""
    folder = RunFolder(path.resolve())
    where = _address(folder)
    try:
        with open_session(ClusterConfig(address=where, token_file=_token_file(folder))):
            if (old := find_controller(controller_name(folder.path))) is not None:
                make_room(path, old, take_over=take_over)
    except ClusterError as error:
        if not take_over:
            raise ClusterError(
                f"Whether a controller still runs {path} cannot be found out: {error.message}",
                "Where its cluster is gone for good, continue with --take-over: it can write nothing more then.",
            ) from error


def lost(folder: RunFolder) -> str:
    """What ended a controller that has fallen silent; empty for one that may live. For a process that has no Ray.
    Raises `ClusterError` where its cluster does not answer either."""
    said = folder.state().get("controller") or {}
    prepare_environment(_token_file(folder))
    check_cluster(_address(folder), given_token(), KNOCK_S)
    return death_at(_address(folder), str(said.get("actor", "")))


def kill_controller(folder: RunFolder) -> bool:
    """Ends the run's controller by force. False where it is gone already."""
    where = _address(folder)
    with open_session(ClusterConfig(address=where, token_file=_token_file(folder))):
        controller = find_controller(controller_name(folder.path))
        if controller is not None:
            controller.kill()
        return controller is not None


def _attach(folder: RunFolder, where: str, quiet: bool) -> None:
    name = controller_name(folder.path)
    controller = find_controller(name)
    if controller is not None:
        about = controller.about()
        _say(quiet, f"attached to controller {name}, process {about['pid']} on {about['host']}")
        follower = Follower(folder.path, _stream(quiet))
        follower.catch_up()
        _follow(folder.path, controller, follower)
    elif not folder.config.exists():
        raise DataError(
            f"{folder.path} holds no run, and the cluster at {where} has no controller {name}.",
            "Name the folder that `treadle run --detach --dir` was given, as its nodes see it, and its cluster.",
        )
    elif folder.state().get("state") == "running":
        raise _died(folder, name)
    else:
        conclude(folder)


@dataclass(slots=True)
class _Watch:
    """Shows what is new, and looks for the cluster where its controller falls silent: Ray itself would wait a minute
    for its head and then end this process without a word of ours."""

    path: Path
    address: str
    follower: Follower
    failed: int = 0
    due_s: float = KNOCK_EVERY_S

    def __call__(self, silent_s: float) -> None:
        self.follower.look()
        if silent_s < KNOCK_EVERY_S:
            self.failed, self.due_s = 0, KNOCK_EVERY_S
        elif silent_s >= self.due_s:
            self.due_s = silent_s + KNOCK_EVERY_S
            try:
                check_cluster(self.address, given_token(), KNOCK_S)
            except ClusterError as error:
                self.failed += 1
                if self.failed == KNOCKS:
                    raise ClusterError(
                        f"{error.message} The run's controller was there.",
                        f"Continue with: treadle resume {self.path} --take-over",
                    ) from error
            else:
                self.failed = 0


def _follow(path: Path, controller: Controller, follower: Follower) -> None:
    """Shows the run until it ends; raises its error."""
    folder = RunFolder(path)
    try:
        outcome = controller.ended(_Watch(path, str(controller.known["address"]), follower))
    except KeyboardInterrupt:
        raise _left(path) from None
    except DeadlineError as error:
        raise DeadlineError(error.message, f"Continue with: treadle resume {path} --take-over") from error
    except RoleError as error:
        follower.look()
        state = folder.state()
        mine = (state.get("controller") or {}).get("actor") == controller.known.get("actor")
        if not mine or state.get("state") == "running":
            raise RoleError(error.message, _resume(path)) from error
        conclude(folder)  # it had time to say how it ended
    else:
        follower.look()
        if outcome.kind:
            raise error_of(outcome)


def _died(folder: RunFolder, name: str) -> RoleError:
    """Of a controller that is gone and has not said why."""
    cause = death_of(str((folder.state().get("controller") or {}).get("actor", "")))
    return RoleError(
        f"controller {name}: {cause or 'its cluster knows nothing of it any more'}.", _resume(folder.path)
    )


def _resume(path: Path) -> str:
    return f"Nothing of the run is left running; continue with: treadle resume {path} --detach"


def _left(path: Path) -> Interrupted:
    return Interrupted(
        "No longer followed; the run goes on.",
        f"Attach again with `treadle attach {path}`, end it with `treadle stop {path}`.",
    )


def _play(recipe: Recipe, path: Path, cwd: str, continued: bool, about: Mapping[str, Any]) -> Outcome:
    """What the controller does: what `treadle run` does, where `treadle run` was called."""
    from treadle.workflows.launch import play

    with suppress(OSError):  # on another machine that folder may not exist
        os.chdir(cwd)
    try:
        if continued:
            RunFolder.existing(path)
        asyncio.run(play(recipe, path, quiet=False, controller=about))
    except TreadleError as error:
        return outcome_of(error)
    except BaseException as error:  # noqa: BLE001  nobody else would hear of it
        _keep_traceback(path / "logs" / "controller.err")
        return outcome_of(error)
    return Outcome()


def _keep_traceback(file: Path) -> None:
    with suppress(OSError), file.open("a") as out:
        traceback.print_exc(file=out)


def _address(folder: RunFolder) -> str:
    """The cluster of the run's controller; empty for a run without one."""
    return str((folder.state().get("controller") or {}).get("address", ""))


def _token_file(folder: RunFolder) -> str:
    """`cluster.token_file` of the run, read without building its recipe, which would take seconds."""
    from omegaconf import OmegaConf

    if not folder.config.exists():
        return ""
    return str(OmegaConf.select(OmegaConf.load(folder.config), "cluster.token_file", default=""))


def _stream(quiet: bool) -> Any:
    return sys.stderr if quiet else sys.stdout


def _say(quiet: bool, text: str) -> None:
    stream = _stream(quiet)
    stream.write(text + "\n")
    stream.flush()
