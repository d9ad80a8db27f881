"""`reflection`: how often the thinking turns back on itself; a metric, so list it in `verify.parts` with weight 0.

The English words are those that DeepSeek-R1's authors counted over training (Nature 2025, supplement: wait, mistake,
however, but, retry, error, verify, wrong, evaluate, check) and their inflections; the Chinese ones are their
counterparts. A reward for them would be learnt at once and mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from treadle.actors.verify.words import WITHOUT_SPACES, runs, thinking

if TYPE_CHECKING:
    from treadle.platform.records import Json

ENGLISH = frozenset(
    (
        *("wait", "however", "but", "wrong", "wrongly"),
        *("mistake", "mistakes", "mistaken", "error", "errors"),
        *("retry", "retries", "retried", "retrying"),
        *("verify", "verifies", "verified", "verifying", "verification", "reverify"),
        *("evaluate", "evaluates", "evaluated", "evaluating", "reevaluate", "reevaluating"),
        *("check", "checks", "checked", "checking", "recheck", "rechecks", "rechecked", "rechecking"),
    )
)
"""Hyphens end a word, so that `re-check` and `double-check` count by their second half."""
CHINESE = (
    *("等等", "等一下", "不对", "错误", "错了", "但是", "然而", "不过"),
    *("重试", "重新", "验证", "验算", "检查", "核对", "再想"),
)
_CHINESE = re.compile("|".join(CHINESE))


class ReflectionVerifier:
    """Part `reflection`: reflection words per 100 words of the thinking (see `words`), 0 where it has none; reads
    nothing of the payload.

    Example: `ReflectionVerifier().score("<think>It is 5. Wait, let me double-check that.</think>5", {})`: 2 of 8
    words, so `(("reflection", 25.0),)`.
    """

    name = "reflection"
    version = "1"
    deterministic = True

    def score(self, completion: str, payload: Mapping[str, Json]) -> tuple[tuple[str, float], ...]:  # noqa: ARG002  the form does not depend on the task
        total = found = 0
        for script, run in runs(thinking(completion)):
            if script in WITHOUT_SPACES:
                total += len(run)
                found += len(_CHINESE.findall(run))
            else:
                total += 1
                found += run.casefold() in ENGLISH
        return (("reflection", 100.0 * found / total if total else 0.0),)
