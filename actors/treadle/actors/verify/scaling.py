"""How many processes a pool should have: a rule over what it has measured, without side effects."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a pool knows about itself. `stuck` are processes that have worked on one sample for longer than
    `verify.shed_after` of its deadline: they count as gone until they come back or are killed."""

    waiting_samples: int
    age_s: float
    stuck: int
    busy: int
    service_s: float
    """Mean seconds of a completion, without stuck ones."""


def wanted_processes(load: Load, lowest: int, highest: int, age_s: float) -> int:
    """`lowest` beside the stuck ones: a process that takes over at once costs a fork, and one that is missing costs
    everybody a deadline. While the queue is old, as many beside the stuck ones as finish what waits within `age_s`, by
    Little's law: with n processes and S seconds a sample, the last of L waiting samples waits L·S/n seconds. A burst
    that is judged in time needs no new process. At most `highest`.

    Example: 100 samples wait, 10 ms each, the oldest for 0.6 s; with `age_s=0.5` two processes are wanted, and one
    more for each stuck one.
    """
    moving = lowest
    if load.waiting_samples and load.age_s > age_s:
        drain = math.ceil(load.waiting_samples * load.service_s / age_s)
        moving = max(lowest, drain, load.busy - load.stuck + 1)
    return min(load.stuck + moving, highest)
