"""How far a run's mirror is: what `mirror.json` in the run folder says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`stage` and `step` are of the newest mirrored commit (empty and -1 without one). Since `behind_since` (0: never)
    a newer one has been waiting; `lag_steps` lie between the two. `skipped` commits were overtaken by newer ones.
    `error` is why nothing arrives at the moment, since `failing_since`, after `failures` failed attempts in all. Times
    are seconds since 1970.
    """

    stage: str = ""
    step: int = -1
    mirrored_unix_s: float = 0.0
    behind_since: float = 0.0
    lag_steps: int = 0
    commits: int = 0
    skipped: int = 0
    failures: int = 0
    failing_since: float = 0.0
    error: str = ""

    def lag_s(self, now: float) -> float:
        """Seconds that the oldest commit newer than the mirror has been waiting."""
        return max(0.0, now - self.behind_since) if self.behind_since else 0.0
