"""How many processes a pool should have: a rule over what it has measured, without side effects."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a pool knows about itself. `stuck` are processes that have worked on one sample for longer than
    `verify.shed_after_s`: they count as gone until they come back or are killed."""

    waiting_samples: int
    age_s: float
    stuck: int
    busy: int
    service_s: float
    """Mean seconds of a completion, without stuck ones."""


def wanted_processes(load: Load, lowest: int, highest: int, age_s: float) -> int:
    """As many as finish what waits within `age_s`, by Little's law: with n processes and S seconds a sample, the
    last of L waiting samples waits L·S/n seconds. Only an old queue asks for more: a burst that is judged in time
    needs no new process. Between `lowest` and `highest`.

    Example: 100 samples wait, 10 ms each, the oldest for 0.6 s; with `age_s=0.5` two processes are wanted, and one
    more for each stuck one.
    """
    needed = lowest
    if load.waiting_samples and load.age_s > age_s:
        drain = math.ceil(load.waiting_samples * load.service_s / age_s)
        needed = max(load.stuck + max(1, drain), load.busy + 1)
    return min(max(needed, lowest), highest)
