"""`treadle chaos`: a plan is checked, a run is disturbed by it, and an account is given."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from treadle.platform.errors import ConfigError, DataError
from treadle.platform.failpoints import ENV, ENV_FILE
from treadle.workflows.commands import Result, addressed, check_inputs, decides
from treadle.workflows.folder import CHAOS, RunFolder, write_json
from treadle.workflows.gamedays.account import Account, Recoveries, account, digest_of, events_of, percentile
from treadle.workflows.gamedays.conductor import SAID, Conductor, Played
from treadle.workflows.gamedays.plan import Plan, Timed, read_plan
from treadle.workflows.recipe import Recipe, load_recipe
from treadle.workflows.texts import table

FILE = "chaos.json"


def chaos(
    source: str,
    plan_file: Path,
    overrides: Sequence[str],
    folder: Path | None,
    address: str,
    compare: Path | None,
    *,
    fresh: bool,
    dry_run: bool,
    as_json: bool,
) -> Result:
    """Checks plan, recipe and data, then plays the game day. Exit code 1 where an invariant broke or the run did not
    end well."""
    plan, recipe = read_plan(plan_file), addressed(load_recipe(source, overrides), address)
    plan.fit(recipe)
    for name in (ENV, ENV_FILE):
        if os.environ.get(name):
            raise ConfigError(f"{name} is set, and the plan orders the faults.", f"Unset {name}.")
    check_inputs(recipe)
    if dry_run:
        return {
            "plan": plan.name,
            "recipe": recipe.name,
            "faults": _texts(plan),
            "text": "\n".join(_texts(plan)),
        }
    target = folder or Path("runs") / f"{recipe.name}-chaos"
    _clear(target, fresh=fresh)
    where = [f"--address={address}"] if address else []
    words = [source, *overrides, *where]
    if compare is not None:
        _undisturbed(compare, recipe, words, as_json=as_json)
    played = Conductor(plan, words, target, quiet=as_json).play()
    told = tell(plan, played, RunFolder(target), compare)
    if RunFolder(target).config.exists():
        write_json(target / FILE, {key: value for key, value in told.items() if key != "text"})
    return {**told, "exit_code": int(bool(told["broken"]))}


def _texts(plan: Plan) -> list[str]:
    return [fault.text for fault in plan.faults]


def _clear(target: Path, *, fresh: bool) -> None:
    RunFolder.clear(target, fresh=fresh)
    if (target / CHAOS).exists():
        if not fresh:
            raise ConfigError(
                f"{target} holds a game day already.", "Choose another --dir, or replace it with --fresh."
            )
        shutil.rmtree(target / CHAOS)


def _undisturbed(compare: Path, recipe: Recipe, words: Sequence[str], *, as_json: bool) -> None:
    """Makes sure that a finished run without faults of what this recipe trains lies in `compare`."""
    run = RunFolder(compare)
    if not run.config.exists():
        Conductor(Plan(name="", faults=()), words, compare, quiet=as_json).play()
    if not run.config.exists() or not run.summary.exists():
        raise DataError(
            f"--compare {compare} holds no finished run.",
            f"Finish it: treadle resume {compare}, or name another.",
        )
    mine, other = decides(recipe), decides(load_recipe(run.config))
    if changed := sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key)):
        raise ConfigError(
            f"--compare {compare} is a run with other settings ({', '.join(changed)}).",
            "Name a folder of the same recipe and overrides, or a new one, which is filled first.",
        )


def tell(plan: Plan, played: Played, run: RunFolder, compare: Path | None) -> Result:
    """Everything that is known of a game day that is over; `broken` names what does not hold."""
    began = run.config.exists()
    finished = began and played.code == 0 and run.summary.exists()
    found = account(run.path) if began and run.ledger.exists() else None
    faults = _faults(plan, played, run)
    seconds = [fault["recovered_s"] for fault in faults if fault.get("recovered_s") is not None]
    told: Result = {
        "folder": str(run.path),
        "plan": plan.name,
        "unix_s": time.time(),
        "wall_s": round(played.wall_s, 3),
        "drivers": played.drivers,
        "finished": finished,
        "failure": "" if finished else _failure(played, run),
        "faults": faults,
        "recovered_p50_s": percentile(seconds, 0.5),
        "recovered_p95_s": percentile(seconds, 0.95),
        "zombie_drivers": list(played.zombies),
        "account": asdict(found) if found else {},
        "weights_digest": digest_of(run.path) if finished else "",
    }
    if compare is not None:
        told["compared_with"] = str(compare)
        told["same_digest"] = finished and told["weights_digest"] == digest_of(compare)
    told["broken"] = _broken(plan, told, found)
    return {**told, "text": _text(told)}


def _broken(plan: Plan, told: Result, found: Account | None) -> list[str]:
    counts = asdict(found) if found else {}
    broken = [name for name in plan.check if counts.get(name)]
    if not told["finished"]:
        broken.append("finished")
    if told.get("same_digest") is False:
        broken.append("same digest")
    if any(code == 0 for code in told["zombie_drivers"]):
        broken.append("fencing")  # a driver that was replaced ended as if the run were still its own
    return broken


def _faults(plan: Plan, played: Played, run: RunFolder) -> list[dict[str, Any]]:
    recoveries = Recoveries.of(run.path)
    told = []
    for number, fault in enumerate(plan.faults):
        struck = played.struck.get(number)
        if struck is None:
            why = played.missed.get(number) or _why_not(fault)
            told.append({"fault": fault.text, "where": fault.where, "struck": False, "why": why})
            continue
        mended = recoveries.after(fault.role, struck.at, ended=fault.ends)
        told.append(
            {
                "fault": fault.text,
                "where": fault.where,
                "struck": True,
                "unix_s": struck.at,
                "pid": struck.pid,
                "recovered_s": mended[0] if mended else None,
                "recovered_by": mended[1] if mended else "",
            }
        )
    return told


def _why_not(fault: Any) -> str:
    if isinstance(fault, Timed):
        return "the run was over before"
    subject = f" of {fault.fault.subject}" if fault.fault.subject else ""
    times = f" for the {fault.fault.hit}th time" if fault.fault.hit > 1 else ""
    return f"no process passed {fault.fault.name}{subject}{times}"


def _failure(played: Played, run: RunFolder) -> str:
    """Why the run did not finish."""
    if played.timed_out:
        return "it was stopped at the plan's deadline_s"
    with contextlib.suppress(OSError, IndexError):
        return str(events_of(run.path, "failure")[-1]["message"])
    with contextlib.suppress(OSError, IndexError):
        said = (run.path / CHAOS / SAID).read_text().splitlines()
        return [line for line in said if line.startswith("treadle: ")][-1]
    return f"its driver ended with code {played.code}"


def _text(told: Result) -> str:
    rows = [[_at(told, fault), fault["fault"], *_fate(fault)] for fault in told["faults"]]
    lines = table(["after", "fault", "struck", "recovery"], rows)
    counts = "  ".join(f"{name} {count}" for name, count in told["account"].items())
    lines += ["", f"groups: {counts}" if counts else "no group was issued"]
    if "same_digest" in told:
        same = "the same digest as" if told["same_digest"] else "ANOTHER DIGEST than"
        lines.append(f"weights: {same} {told['compared_with']}")
    if told["zombie_drivers"]:
        refused = sum(code != 0 for code in told["zombie_drivers"])
        lines.append(
            f"drivers that woke after they were replaced: {len(told['zombie_drivers'])}, refused: {refused}"
        )
    missed = sum(not fault["struck"] for fault in told["faults"])
    if missed:
        lines.append(
            f"{missed} of {len(rows)} faults were not struck: the game day has shown less than was planned"
        )
    if told["failure"]:
        lines.append(f"the run did not finish: {told['failure']}")
    verdict = f"BROKEN: {', '.join(told['broken'])}" if told["broken"] else "all invariants hold"
    return "\n".join([*lines, f"{verdict}  ({Path(told['folder']) / FILE})"])


def _at(told: Result, fault: dict[str, Any]) -> str:
    """Seconds from the game day's beginning."""
    return f"{fault['unix_s'] - told['unix_s'] + told['wall_s']:.0f} s" if fault["struck"] else ""


def _fate(fault: dict[str, Any]) -> tuple[str, str]:
    if not fault["struck"]:
        return "NOT STRUCK", fault["why"]
    if fault["recovered_s"] is None:
        return f"process {fault['pid']}", "no step came after it"
    return f"process {fault['pid']}", f"{fault['recovered_s']:.1f} s, {fault['recovered_by']}"
