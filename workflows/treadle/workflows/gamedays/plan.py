"""What is to go wrong on a game day, read from a small YAML file and checked before anything starts.

faults:
  - rollout.before_draw[sum-12]@3: kill                  # a failpoint, its subject, its passage: what happens
  - driver.after_lease@4: kill                           # the run is continued by `treadle resume`
  - {at_step: 3, role: learner, which: 1, action: kill}  # a process, from outside
  - {at_s: 40, role: verify, action: freeze, for_s: 10}
check: [lost, doubled, mixed, stale, poisoned]           # what must be 0; all of them where this is left out
deadline_s: 1800                                         # longest the whole game day may take
"""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.platform.config.schema import did_you_mean
from treadle.platform.config.sources import Layer, parse_yaml
from treadle.platform.errors import ConfigError
from treadle.platform.failpoints import POINTS, Fault, parse_fault
from treadle.workflows.configs import ExportConfig
from treadle.workflows.recipe import Recipe

INVARIANTS = ("lost", "doubled", "mixed", "stale", "poisoned")
ROLES = ("rollout", "verify", "verifier", "learner", "broadcast", "driver")
"""`verify` is an actor of the pool, `verifier` one of the processes that judge for it."""
ACTIONS: Mapping[str, signal.Signals] = {
    "kill": signal.SIGKILL,
    "terminate": signal.SIGTERM,
    "freeze": signal.SIGSTOP,
}
DEADLINE_S = 3600.0
_OF_THE_DRIVER = ("driver.", "checkpoint.", "mirror.")
_KEYS = ("faults", "check", "deadline_s")
_TIMED = ("at_s", "at_step", "role", "which", "action", "for_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointed:
    """A fault at a failpoint, as it was written."""

    fault: Fault
    text: str
    where: str

    @property
    def role(self) -> str:
        """Whose process it strikes."""
        if self.fault.name == "verify.in_child":
            return "verifier"
        return "driver" if self.of_the_driver else self.fault.name.partition(".")[0]

    @property
    def ends(self) -> bool:
        """Whether the process must be replaced afterwards."""
        return self.fault.action not in ("sleep", "corrupt")

    @property
    def of_the_driver(self) -> bool:
        return self.fault.name.startswith(_OF_THE_DRIVER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A signal to a process from outside: `at_s` seconds after the run was started, or once the run has made `at_step`
    steps. One that freezes is woken after `for_s`; 0 leaves it to whoever finds it."""

    role: str
    which: int
    action: str
    at_s: float | None
    at_step: int | None
    for_s: float
    where: str

    @property
    def ends(self) -> bool:
        """Whether the process must be replaced afterwards."""
        return not self.for_s

    @property
    def text(self) -> str:
        when = f"at step {self.at_step}" if self.at_s is None else f"at {self.at_s:g} s"
        lasts = f" for {self.for_s:g} s" if self.for_s else ""
        return f"{when}: {self.action} {self.role} {self.which}{lasts}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The faults in the order of the file, and what must hold afterwards."""

    name: str
    faults: tuple[Pointed | Timed, ...]
    check: tuple[str, ...] = INVARIANTS
    deadline_s: float = DEADLINE_S

    @property
    def pointed(self) -> tuple[Pointed, ...]:
        return tuple(fault for fault in self.faults if isinstance(fault, Pointed))

    @property
    def timed(self) -> tuple[Timed, ...]:
        return tuple(fault for fault in self.faults if isinstance(fault, Timed))

    def orders(self) -> dict[str, list[str]]:
        """The failpoints' faults as a file for `TREADLE_FAILPOINTS_FILE`."""
        orders: dict[str, list[str]] = {}
        for pointed in self.pointed:
            point, _, action = pointed.text.partition(": ")
            name, _, hit = point.partition("@")
            orders.setdefault(name, []).append(f"{action}@{hit or 1}")
        return orders

    def fit(self, recipe: Recipe) -> None:
        """Raises `ConfigError` for what cannot happen in a run of this recipe."""
        counts = {
            "rollout": ("rollout.workers", recipe.rollout.workers),
            "verify": ("verify.actors", recipe.verify.actors),
            "verifier": ("verify.max_processes", recipe.verify.actors * recipe.verify.most_processes),
            "learner": ("learner.ranks", recipe.learner.ranks),
        }
        steps = sum(s.steps for s in recipe.stages.values() if not isinstance(s, ExportConfig))
        for timed in self.timed:
            setting, count = counts.get(timed.role, ("one", 1))
            if timed.which >= count:
                raise ConfigError(
                    f"{timed.where}: there is no {timed.role} {timed.which}; the recipe has {setting}={count}.",
                    f"which counts from 0 to {count - 1}.",
                )
            if timed.at_step is not None and timed.at_step >= steps:
                raise ConfigError(
                    f"{timed.where}: at_step={timed.at_step} is never followed by another one: the recipe has "
                    f"{steps} steps.",
                    "Choose an earlier step.",
                )
        names = {
            "learner.before_step": [str(rank) for rank in range(recipe.learner.ranks)],
            "rollout.mid_generation": [f"rollout-{index}" for index in range(recipe.rollout.workers)],
        }
        for pointed in self.pointed:
            subject, known = pointed.fault.subject, names.get(pointed.fault.name)
            if subject and known and subject not in known:
                raise ConfigError(
                    f"{pointed.where}: {pointed.fault.name}[{subject}] is nobody in this recipe.",
                    did_you_mean(subject, known),
                )


def read_plan(path: Path) -> Plan:
    """Raises `ConfigError` with file and line for whatever is wrong with it."""
    try:
        layer = parse_yaml(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--plan {path} cannot be read: {error}.") from error
    for key in layer.tree:
        if key not in _KEYS:
            raise ConfigError(
                f"{layer.where((str(key),))}: {key}: unknown key.", did_you_mean(str(key), _KEYS)
            )
    given = layer.tree.get("faults")
    if not isinstance(given, list) or not given:
        raise ConfigError(
            f"{layer.where(('faults',))}: faults: expected a list of at least one fault.",
            "Write e.g. `- rollout.before_draw@3: kill`.",
        )
    faults = tuple(_fault(layer, number, item) for number, item in enumerate(given))
    _refuse_repeats(faults)
    return Plan(
        name=str(path), faults=faults, check=_invariants(layer), deadline_s=_seconds(layer, DEADLINE_S)
    )


def _fault(layer: Layer, number: int, item: Any) -> Pointed | Timed:
    where = layer.where(("faults", str(number)))
    if not isinstance(item, Mapping):
        raise ConfigError(f"{where}: {item!r} is no fault.", "Write `failpoint@passage: action`.")
    if set(item) & set(_TIMED):
        return _timed(where, item)
    if len(item) != 1:
        raise ConfigError(f"{where}: {len(item)} failpoints in one fault.", "Write a `-` before each.")
    [(point, action)] = item.items()
    return _pointed(where, str(point), "" if action is None else str(action))


def _pointed(where: str, point: str, action: str) -> Pointed:
    name, at, hit = point.partition("@")
    try:
        fault = parse_fault(name, f"{action}@{hit}" if at else action)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", error.remedy) from error
    pointed = Pointed(fault=fault, text=f"{point}: {action}", where=where)
    if "@" in action:
        raise ConfigError(
            f"{where}: {action!r}: the passage belongs to the failpoint.", f"Write {name}@3: kill."
        )
    if fault.action == "corrupt" and "`corrupt`" not in POINTS[fault.name]:
        able = [known for known, said in POINTS.items() if "`corrupt`" in said]
        raise ConfigError(f"{where}: there is nothing to corrupt at {fault.name}.", f"Use {', '.join(able)}.")
    if pointed.of_the_driver and not fault.hit and fault.action not in ("sleep", "corrupt"):
        raise ConfigError(
            f"{where}: {point}: {action} would end every driver that continues the run.",
            "Name a passage: @3.",
        )
    return pointed


def _timed(where: str, item: Mapping[str, Any]) -> Timed:
    for key in item:
        if key not in _TIMED:
            raise ConfigError(f"{where}: {key}: unknown key.", did_you_mean(str(key), _TIMED))
    if ("at_s" in item) == ("at_step" in item):
        raise ConfigError(f"{where}: a process is struck at_s or at_step.", "Give one of the two.")
    for key, known in (("role", ROLES), ("action", tuple(ACTIONS))):
        if item.get(key) not in known:
            raise ConfigError(f"{where}: {key}={item.get(key)!r}.", did_you_mean(str(item.get(key)), known))
    timed = Timed(
        role=item["role"],
        which=_number(where, "which", item.get("which", 0), whole=True),
        action=item["action"],
        at_s=_number(where, "at_s", item["at_s"]) if "at_s" in item else None,
        at_step=_number(where, "at_step", item["at_step"], whole=True) if "at_step" in item else None,
        for_s=_number(where, "for_s", item.get("for_s", 0)),
        where=where,
    )
    if timed.for_s and timed.action != "freeze":
        raise ConfigError(
            f"{where}: for_s={timed.for_s:g} goes with freeze.", f"Nobody wakes from {timed.action}."
        )
    return timed


def _number(where: str, key: str, value: Any, *, whole: bool = False) -> Any:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < math.inf:
        raise ConfigError(f"{where}: {key}={value!r} is no {'count' if whole else 'number'} from 0 up.")
    return value


def _invariants(layer: Layer) -> tuple[str, ...]:
    given = layer.tree.get("check", list(INVARIANTS))
    if not isinstance(given, list):
        raise ConfigError(f"{layer.where(('check',))}: check: expected a list.", did_you_mean("", INVARIANTS))
    for number, name in enumerate(given):
        if name not in INVARIANTS:
            where = layer.where(("check", str(number)))
            raise ConfigError(
                f"{where}: check: {name!r} is no invariant.", did_you_mean(str(name), INVARIANTS)
            )
    return tuple(given)


def _seconds(layer: Layer, default: float) -> float:
    value = _number(layer.where(("deadline_s",)), "deadline_s", layer.tree.get("deadline_s", default))
    if not value:
        raise ConfigError(f"{layer.where(('deadline_s',))}: deadline_s=0 leaves no time.")
    return float(value)


def _refuse_repeats(faults: Sequence[Pointed | Timed]) -> None:
    """Two faults of one failpoint, passage and action would be told as one."""
    seen: dict[str, str] = {}
    for fault in faults:
        if (
            isinstance(fault, Pointed)
            and (first := seen.setdefault(fault.fault.label, fault.where)) != fault.where
        ):
            raise ConfigError(
                f"{fault.where}: {fault.text} was already ordered at {first}.", "Keep one of the two."
            )
