"""Verdicts by content: the same completion to the same task is judged once.

Late in training most completions of a group are the same text.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping

from treadle.platform.records import Verdict, VerdictStatus


class VerdictCache:
    """The last `entries` scored verdicts. Failures are not kept: they say nothing about the completion."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._held: OrderedDict[bytes, Verdict] = OrderedDict()
        self.hits = 0

    def get(self, key: bytes) -> Verdict | None:
        verdict = self._held.get(key)
        if verdict is not None:
            self._held.move_to_end(key)
            self.hits += 1
        return verdict

    def put(self, key: bytes, verdict: Verdict) -> None:
        if verdict.status is not VerdictStatus.SCORED or not self._entries:
            return
        self._held[key] = verdict
        self._held.move_to_end(key)
        if len(self._held) > self._entries:
            self._held.popitem(last=False)


def task_key(verifier: str, payload: Mapping[str, object]) -> bytes:
    """Of what a group is judged by."""
    return _digest(verifier.encode(), json.dumps(dict(payload), sort_keys=True).encode())


def sample_key(task: bytes, text: str, finished: bool) -> bytes:
    """Of one completion to a task."""
    return _digest(task, b"1" if finished else b"0", text.encode("utf-8", "surrogatepass"))


def _digest(*parts: bytes) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()
