"""A process that runs verifiers, from the inside.

It is killed without warning when a completion takes too long, so it keeps nothing that matters. It imports neither
numpy nor ray nor torch, and is forked from one that does not either (`fork_server`).
"""

from __future__ import annotations

import os
import resource
from time import monotonic
from typing import TYPE_CHECKING, cast

from treadle.actors.verify.composite import CompositeVerifier, ScoringSpec, make_composite
from treadle.actors.verify.frames import MAX_DETAIL_CHARACTERS, Channel, Progress
from treadle.platform.failpoints import failpoint

if TYPE_CHECKING:
    from treadle.platform.records import Json

RETIRED = 75
"""Exit status after a completion exhausted the memory: what the heap looks like then is anyone's guess."""
FLUSH_AFTER_S = 0.005
"""Finished scores wait this long for company: fast batches answer in one frame, slow ones one by one."""
_OUTPUT_BYTES = 2**20
_OPEN_FILES = 64


def limit_resources(memory_bytes: int) -> None:
    """Limits of this process, soft ones: it may start programs of its own with other limits (`programs`). The CPU
    limit is set per batch."""
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, _OUTPUT_BYTES),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
    ):
        hard = resource.getrlimit(limit)[1]
        ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (ceiling, hard))
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        return  # the kernel's choice of a victim is then its own


class Judge:
    """Scores batches and reports a row per sample: index, parts, wall seconds, detail (empty when scored)."""

    def __init__(
        self,
        channel: Channel,
        progress: Progress,
        spec: ScoringSpec,
        verifiers: dict[str, CompositeVerifier],
    ) -> None:
        self._channel = channel
        self._progress = progress
        self._spec = spec
        self._verifiers = verifiers

    def serve(self) -> None:
        """Until the pool closes its end."""
        self._channel.send({"ready": "started"})
        while (message := self._channel.receive()) is not None:
            if "prepare" in message:
                self.prepare(str(message["prepare"]))
            else:
                self.judge(message)

    def prepare(self, name: str) -> None:
        """Builds a verifier, unless the fork brought it along, and answers with its version."""
        try:
            if name not in self._verifiers:
                self._verifiers[name] = make_composite(name, self._spec)
            verifier = self._verifiers[name]
        except Exception as error:  # noqa: BLE001  whatever a factory raises is answered, not died of
            self._channel.send({"error": describe(error)})
        else:
            self._channel.send({"ready": verifier.version, "deterministic": verifier.deterministic})

    def judge(self, batch: dict[str, Json]) -> None:
        """Answers with one or more frames of rows; the last one says `end`."""
        verifier = self._verifiers[str(batch["judge"])]
        payloads = cast("list[dict[str, Json]]", batch["payloads"])
        samples = cast("list[tuple[str, bool, int]]", batch["samples"])
        self._limit_cpu(len(samples) * cast(float, batch["deadline_s"]))
        rows: list[Json] = []
        flushed_s = monotonic()
        for index, (text, finished, prompt) in enumerate(samples):
            if self._progress.stops_at(index):
                break
            began_s = monotonic()
            if rows and began_s - flushed_s > FLUSH_AFTER_S:
                self._channel.send({"rows": rows})
                rows, flushed_s = [], began_s
            self._progress.start(index, began_s)
            try:
                failpoint("verify.in_child")
                score = verifier.score(text, payloads[prompt], finished)
                parts: list[Json] = [[name, value] for name, value in score]
                rows.append([index, parts, monotonic() - began_s, ""])
            except Exception as error:  # noqa: BLE001  whatever a verifier raises is a failed verdict
                rows.append([index, [], monotonic() - began_s, describe(error)])
                if isinstance(error, MemoryError):
                    self._retire(rows)
        self._progress.start(Progress.IDLE, monotonic())
        self._channel.send({"rows": rows, "end": True})

    def _retire(self, rows: list[Json]) -> None:
        self._progress.start(Progress.IDLE, monotonic())
        self._channel.send({"rows": rows})
        os._exit(RETIRED)

    def _limit_cpu(self, seconds: float) -> None:
        """The pool watches the clock; this limit holds when the pool itself is frozen."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        limit = int(usage.ru_utime + usage.ru_stime + seconds) + 5
        resource.setrlimit(
            resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
        )


def describe(error: Exception) -> str:
    """Type and message; never empty, because an empty detail means scored."""
    return f"{type(error).__name__}: {error}"[:MAX_DETAIL_CHARACTERS]
