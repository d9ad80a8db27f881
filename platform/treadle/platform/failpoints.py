"""Faults on order: named points in the code where a process can be made to die, raise, sleep or corrupt.

Chaos tests, and operators rehearsing an outage, set one of

    TREADLE_FAILPOINTS="learner.before_step=kill@3;verify.before_judge=sleep:30"
    TREADLE_FAILPOINTS_FILE=faults.json    {"learner.before_step": "kill@3", "verify.before_judge":
    ["sleep:1@*"]}

Each fault is `name=action[:argument][@n]`: it happens on the n-th time this process passes the point (1 by
default, `*` for every time). Actions:

    kill            SIGKILL to the own process
    exit[:code]     leave at once with that code (1), without cleaning up
    raise[:text]    `FailpointError`
    sleep:seconds   block the calling thread, as a hung system call would
    freeze          SIGSTOP to the own process: it does nothing at all until somebody sends SIGCONT
    allocate:MiB    take that much memory, write to all of it, and keep it; `MemoryError` where there is not as much
    corrupt         `failpoint` returns True, and the caller damages what it is about to hand on

Some points have a subject: the worker's name, the rank, the prompt. `name[subject]=action` happens only for that one,
and its passages are counted for themselves: `rollout.before_draw[sum-12]=kill@*` is a prompt that ends every worker.

With TREADLE_FAILPOINTS_ONCE=<folder> each fault happens once in all processes together: a file in the folder
remembers it with the process's id, so that a role which is killed and restarted does not die forever. A fault for every
passage (`@*`) goes on happening; the file remembers its first.

All points are listed in `POINTS`; a fault for any other name is refused, since a misspelt fault would let a
chaos test pass without testing anything.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from treadle.platform.errors import ConfigError, FailpointError

POINTS: dict[str, str] = {
    "driver.after_issue": "a group is in the ledger, nobody draws it yet",
    "driver.after_lease": "a step's groups are leased, the learner has not been called",
    "driver.after_publish": "the engines hold the new weights, the ledger does not know",
    "driver.after_trained": "the ledger knows that the step was trained",
    "driver.after_shards": "a checkpoint's shards are written, the ledger has no mark",
    "driver.after_mark": "the ledger has the mark, the checkpoint is not committed",
    "driver.after_checkpoint": "the checkpoint is committed",
    "checkpoint.before_manifest": "all shards are on the disk, the manifest is not",
    "checkpoint.before_marker": "the manifest is on the disk, the marker is not",
    "mirror.before_manifest": "a commit's files are uploaded, its manifest is not",
    "mirror.before_commit": "the manifest is uploaded, the mirror's log does not name it",
    "learner.before_setup": "a rank is about to load a stage's model; subject: the rank",
    "learner.before_load": "a rank is about to read a checkpoint; subject: the rank",
    "learner.before_probe": "a rank is about to score the probe; subject: the rank",
    "learner.before_publish": "a rank is about to hand out its weights; subject: the rank",
    "learner.before_export": "a rank is about to export the policy; subject: the rank",
    "learner.before_step": "a rank is about to work on a step; subject: the rank",
    "learner.poisoned_loss": "a micro-batch's loss is known; `corrupt` makes it NaN",
    "learner.after_backward": "gradients are there, the weights are not updated",
    "learner.after_optimizer_step": "weights are updated, the report has not left the rank",
    "learner.before_save": "a rank is about to write a checkpoint",
    "learner.mid_save": "some of a checkpoint's shards are written",
    "rollout.before_load": "a worker is about to load a model; subject: the worker",
    "rollout.before_probe": "a worker is about to score the probe; subject: the worker",
    "rollout.before_draw": "a worker took a group; subject: the prompt",
    "rollout.mid_generation": "between two decode steps; subject: the worker",
    "rollout.before_return": "a group is drawn, the driver does not know",
    "rollout.before_stage": "a worker is about to fetch weights",
    "rollout.before_flip": "weights are staged, not adopted",
    "verify.before_start": "an actor of the pool is about to start its processes",
    "verify.before_judge": "the pool took a group",
    "verify.in_child": "inside the process that scores a sample",
    "verify.before_return": "verdicts are known, the driver does not know them",
    "broadcast.before_publish": "a version is trained, nothing was sent",
    "broadcast.in_transit": "buckets arrived and are not checked yet; `corrupt` flips one bit",
    "broadcast.truncated": "buckets arrived and are not checked yet; `corrupt` cuts the last one short",
    "broadcast.stale_base": "a delta arrived, its base is not checked yet; `corrupt` changes the base",
    "broadcast.lost_write": "a delta was written beside the weights in use; `corrupt` undoes one write",
    "broadcast.between_phases": "all engines staged a version, none adopted it",
    "broadcast.after_flip": "engines adopted a version, the coordinator did not report it",
}

ENV, ENV_FILE, ENV_ONCE = "TREADLE_FAILPOINTS", "TREADLE_FAILPOINTS_FILE", "TREADLE_FAILPOINTS_ONCE"
_ACTIONS = {
    "kill": False,
    "exit": False,
    "raise": False,
    "sleep": True,
    "freeze": False,
    "allocate": True,
    "corrupt": False,
}  # needs an argument?
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong. `hit` is the passage it happens on, 0 for all; `subject` is empty for any."""

    name: str
    action: str
    argument: str
    hit: int
    subject: str = ""

    @property
    def label(self) -> str:
        subject = f"[{self.subject}]" if self.subject else ""
        return f"{self.name}{subject}={self.action}@{self.hit or 'all'}".replace("/", "_")


class Faults:
    """The faults of one process and how often each point was passed."""

    def __init__(self, faults: list[Fault], once: Path | None = None) -> None:
        self._by_name: dict[str, list[Fault]] = {}
        for fault in faults:
            self._by_name.setdefault(fault.name, []).append(fault)
        self._once = once
        self._hits: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, self._by_name.values()))

    def hit(self, name: str, subject: str = "") -> bool:
        """Counts a passage and does what is due; True asks the caller to corrupt."""
        due = self._by_name.get(name)
        if due is None:
            return False
        with self._lock:
            counts = {of: self._hits.get((name, of), 0) + 1 for of in {"", subject}}
            self._hits.update({(name, of): count for of, count in counts.items()})
        corrupt = False
        for fault in due:
            if (
                fault.subject in counts
                and fault.hit in (0, counts[fault.subject])
                and (self._first_time(fault) or not fault.hit)
            ):
                corrupt = _act(fault) or corrupt
        return corrupt

    def _first_time(self, fault: Fault) -> bool:
        if self._once is None:
            return True
        self._once.mkdir(parents=True, exist_ok=True)
        try:
            with (self._once / fault.label).open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return False
        return True


def _act(fault: Fault) -> bool:
    _log.warning("failpoint %s in process %d", fault.label, os.getpid())
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.action == "exit":
        os._exit(int(fault.argument or 1))
    elif fault.action == "raise":
        raise FailpointError(f"failpoint {fault.name}: {fault.argument or 'raised on purpose'}")
    elif fault.action == "sleep":
        time.sleep(float(fault.argument))
    elif fault.action == "allocate":
        _allocate(int(fault.argument))
    return fault.action == "corrupt"


_ALLOCATED: list[bytearray] = []


def _allocate(mebibytes: int) -> None:
    block = bytearray(mebibytes * 2**20)
    _ALLOCATED.append(block)
    for page in range(0, len(block), 4096):  # what is not written to takes no memory
        block[page] = 1


def parse_fault(name: str, text: str) -> Fault:
    """`action[:argument][@n]` for one point, `name` or `name[subject]`. Raises `ConfigError` for anything that would do
    nothing."""
    name, _, rest = name.strip().partition("[")
    subject = rest.removesuffix("]")
    if name not in POINTS:
        close = difflib.get_close_matches(name, POINTS, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"failpoint {name!r} does not exist.", f"{hint}Known: {', '.join(POINTS)}.")
    body, at, times = text.strip().partition("@")
    action, _, argument = body.partition(":")
    if action not in _ACTIONS:
        raise ConfigError(
            f"failpoint {name}={text}: unknown action {action!r}.", f"Use one of {', '.join(_ACTIONS)}."
        )
    if at and times != "*" and not (times.isdecimal() and int(times) > 0):
        raise ConfigError(f"failpoint {name}={text}: @{times} is no passage.", "Write @1, @2, ... or @*.")
    if (_ACTIONS[action] and not argument) or not _fits(action, argument):
        raise ConfigError(
            f"failpoint {name}={text}: {argument!r} is no argument of {action}.", "Write e.g. sleep:2.5."
        )
    hit = 0 if times == "*" else int(times or 1)
    return Fault(name=name, action=action, argument=argument, hit=hit, subject=subject)


def _fits(action: str, argument: str) -> bool:
    if not argument:
        return True
    if action == "sleep":
        try:
            return 0 <= float(argument) < float("inf")
        except ValueError:
            return False
    return action == "raise" or (action in ("exit", "allocate") and argument.isdecimal())


def read_faults(environ: Mapping[str, str]) -> Faults | None:
    """The faults an environment asks for, or None. Raises `ConfigError` for a malformed or unknown one; call
    it before roles start to report that early."""
    entries: list[tuple[str, str]] = []
    for item in filter(str.strip, environ.get(ENV, "").split(";")):
        name, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"{ENV}: {item!r} is no `name=action`.")
        entries.append((name, text))
    if environ.get(ENV_FILE):
        entries += _file_entries(Path(environ[ENV_FILE]))
    faults = [parse_fault(name, text) for name, text in entries]
    once = environ.get(ENV_ONCE)
    return Faults(faults, Path(once) if once else None) if faults else None


def _file_entries(path: Path) -> list[tuple[str, str]]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{ENV_FILE}: {path} cannot be read: {error}.") from error
    except ValueError as error:
        raise ConfigError(f"{ENV_FILE}: {path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{ENV_FILE}: {path} must hold one object.", 'Write {"point": "action"}.')
    pairs = [
        (name, text)
        for name, value in content.items()
        for text in (value if isinstance(value, list) else [value])
    ]
    if not all(isinstance(text, str) for _, text in pairs):
        raise ConfigError(f"{ENV_FILE}: {path}: every value must be text or a list of texts.")
    return pairs


class _Armed:
    """The faults of this process, read from the environment on the first passage."""

    loaded = False
    faults: Faults | None = None


def failpoint(name: str, subject: str = "") -> bool:
    """Marks a point where faults can be ordered, for one `subject` if the point has any. Costs two look-ups while none
    is ordered."""
    if not _Armed.loaded:
        arm()
    return _Armed.faults is not None and _Armed.faults.hit(name, subject)


def arm(environ: Mapping[str, str] | None = None) -> None:
    """Reads the faults anew (from `os.environ` by default) and forgets all counts."""
    _Armed.faults = read_faults(os.environ if environ is None else environ)
    _Armed.loaded = True
