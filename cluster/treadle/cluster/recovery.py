"""What to do about a failure: rules as data, a budget, and nothing that acts.

A broken role is replaced and its stage goes back to the newest commit. An error with no broken role behind it (a bad
setting, a mismatch, a prompt that does not fit) would only come again, and stops the run. So does a failure that keeps
coming back at the same step: the step is the cause then, and not the machine. A lack of memory is met with less of what
fills it (`backoff`), which is another try and not the same one again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from treadle.cluster.backoff import BackOff, BackOffs, Lever
from treadle.platform.errors import ConfigError, MismatchError, RoleError, TreadleError


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """`recovery.*`: how often a run may mend itself."""

    max_recoveries: int = 8
    """Within `window_s`. 0 stops the run at the first failure, to be continued by `treadle resume`."""
    window_s: float = 3600.0
    max_refused: int = 3
    """Updates in a row that a guard may refuse (NaN, infinity) before the stage goes back to its commit; 0 is any
    number."""
    same_step: int = 2
    """Failures at one step of a stage that are mended; the next one there stops the run."""
    oom_backoff: bool = True
    """Whether what ran out of memory is started again with half of `learner.max_tokens_per_microbatch`, or of
    `rollout.slots`. The first changes the rounding of losses and gradients, so that a run no longer ends with the bits
    of an undisturbed one."""
    max_oom_backoffs: int = 4
    """How often the ranks' setting, or a worker's, is halved."""

    driver_deadline_s: float = 900.0
    """Longest the driver's event loop may stand still; then the run ends, to be continued by `treadle resume`. 0 is any
    time."""

    def check(self) -> None:
        """Raises `ConfigError` for what cannot work."""
        if self.driver_deadline_s < 0:
            raise ConfigError(
                f"recovery.driver_deadline_s={self.driver_deadline_s} is negative.", "Use 0 for never."
            )
        if min(self.max_recoveries, self.max_refused) < 0 or self.same_step < 1 or not self.window_s > 0:
            raise ConfigError(
                f"recovery.max_recoveries={self.max_recoveries} and recovery.max_refused={self.max_refused} must be "
                f">= 0, recovery.same_step={self.same_step} >= 1 and recovery.window_s={self.window_s} > 0."
            )
        if self.max_oom_backoffs < 1:
            raise ConfigError(
                f"recovery.max_oom_backoffs={self.max_oom_backoffs} must be at least 1.",
                "Set recovery.oom_backoff=false to switch it off.",
            )

    def back_offs(self) -> BackOffs:
        """Decisions about settings that memory grows with."""
        return BackOffs(self.max_oom_backoffs if self.oom_backoff else 0)


class Action(Enum):
    """What is done about a failure."""

    ROLL_BACK = "roll back"
    """Replace the broken roles and continue the stage from its newest commit."""
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What is known when a stage has failed. `step` is the last one it had finished; `broken` are the roles that
    cannot go on as they are. `lever` is there if the learner ran out of memory: what might be lowered."""

    stage: str
    step: int
    error: TreadleError
    broken: frozenset[str]
    lever: Lever | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`reason` says why, in words for the operator; it is empty for a stop that explains itself. `back_off` is what
    goes down before the roles are started again."""

    action: Action
    reason: str
    back_off: BackOff | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Past:
    at_s: float
    stage: str
    step: int
    cause: str
    oom: bool
    backed_off: bool


@dataclass(slots=True)
class RecoveryPolicy:
    """Decides, and remembers what it has decided. `clock` is monotonic.

    Example: `RecoveryPolicy(RecoveryConfig()).decide(Failure(stage="rl", step=7, error=LearnerError("rank 1 died"),
    broken=frozenset({"learner"}))).action` is `Action.ROLL_BACK`.
    """

    config: RecoveryConfig
    clock: Callable[[], float] = time.monotonic
    _past: deque[_Past] = field(default_factory=deque)
    _back_offs: BackOffs = field(init=False)

    def __post_init__(self) -> None:
        self._back_offs = self.config.back_offs()

    def decide(self, failure: Failure) -> Decision:
        """Counts the failure, unless it stops the run."""
        now_s = self.clock()
        while self._past and now_s - self._past[0].at_s > self.config.window_s:
            self._past.popleft()
        refusal = self._refusal(failure)
        if refusal is not None:
            return Decision(action=Action.STOP, reason=refusal)
        lever = failure.lever
        back_off = self._back_offs.lower(lever) if lever is not None else None
        self._past.append(
            _Past(
                at_s=now_s,
                stage=failure.stage,
                step=failure.step,
                cause=failure.error.message,
                oom=lever is not None,
                backed_off=back_off is not None,
            )
        )
        reason = f"{_listed(failure.broken)} must be replaced"
        return Decision(action=Action.ROLL_BACK, reason=reason, back_off=back_off)

    def _refusal(self, failure: Failure) -> str | None:
        curable = isinstance(failure.error, RoleError) and not isinstance(failure.error, MismatchError)
        if not curable or not failure.broken:
            return ""
        if not self.config.max_recoveries:
            return "recovery.max_recoveries=0."
        here = [past for past in self._past if (past.stage, past.step) == (failure.stage, failure.step)]
        stays = self._back_offs.refusal(failure.lever) if failure.lever is not None else ""
        if stays and any(past.backed_off for past in here):
            times = f"memory has run out {sum(past.oom for past in here) + 1} times after step {failure.step}"
            return f"{times}, and {stays}."
        again = [past for past in here if not past.backed_off]
        if len(again) >= self.config.same_step:
            times = f"it has failed {len(again) + 1} times after step {failure.step}"
            held = f"; {stays}" if stays else ""
            return f"{times}; the first cause was: {again[0].cause}{held}"
        if len(self._past) >= self.config.max_recoveries:
            return (
                f"recovery.max_recoveries={self.config.max_recoveries} within {self.config.window_s:g} s are used up; "
                f"the first cause was: {self._past[0].cause}"
            )
        return None


def _listed(roles: frozenset[str]) -> str:
    return " and ".join(f"the {role}" for role in sorted(roles))
