"""Less of what fills memory, after a process ran out of it: decisions as data, and nothing that acts.

The setting that a role's memory grows with is halved for what is started in its place, and once more whenever that runs
out as well, down to a floor and `recovery.max_oom_backoffs` times. For the learner it is
`learner.max_tokens_per_microbatch`: smaller micro-batches make the same loss and gradient, except for rounding. For a
rollout worker it is its own `rollout.slots`, on which its samples do not depend.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Lever:
    """A setting that a role's memory grows with, as it is in force for `name`.

    It may go down to `least`, in multiples of `multiple`; `why_least` says what that is. `configured` is the recipe's.
    """

    role: str
    name: str
    setting: str
    configured: int
    now: int
    least: int
    why_least: str
    multiple: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BackOff:
    """A setting that is lower from now on, for one process or for all ranks.

    Example: of a `Lever` with now=72, least=32 it is `after=36`, and of one with now=40 it is `after=32`.
    """

    role: str
    name: str
    setting: str
    configured: int
    before: int
    after: int

    @property
    def sentence(self) -> str:
        """For the operator."""
        of = f", the recipe says {self.configured}" if self.configured != self.before else ""
        return f"{self.name} goes on with {self.setting}={self.after} instead of {self.before}{of}"


@dataclass(slots=True)
class BackOffs:
    """Decides, and remembers how often it has lowered a setting for each process. 0 is never.

    Example: `BackOffs(4).lower(lever)` is a `BackOff`, or None where `refusal(lever)` says why.
    """

    limit: int
    _made: Counter[str] = field(default_factory=Counter)

    def lower(self, lever: Lever) -> BackOff | None:
        """Counts, where the setting may go down."""
        if self.refusal(lever):
            return None
        self._made[lever.name] += 1
        half = lever.now // 2 // lever.multiple * lever.multiple
        return BackOff(
            role=lever.role,
            name=lever.name,
            setting=lever.setting,
            configured=lever.configured,
            before=lever.now,
            after=max(half, lever.least),
        )

    def refusal(self, lever: Lever) -> str:
        """Why the setting stays as it is, with its value; empty where it may go down."""
        stays = f"{lever.setting}={lever.now} stays in force for {lever.name}"
        if not self.limit:
            return f"{stays}: recovery.oom_backoff=false"
        if lever.now <= lever.least:
            return f"{stays}: {lever.why_least}"
        if self._made[lever.name] >= self.limit:
            return f"{stays}: it was lowered recovery.max_oom_backoffs={self.limit} times from {lever.configured}"
        return ""
