"""Copies commits to a mirror in the background, so that no step ever waits for a network."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from treadle.platform.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FencedError,
    StorageError,
    TreadleError,
)
from treadle.platform.mirror_writer import MirrorWriter, Source
from treadle.platform.records import Json

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 8.0
"""A request every few seconds costs nobody anything; a bucket that is back is found as soon."""
HURRIED_PAUSE_S = 2.0
FAILING, RECOVERED, SKIPPED = "mirror_failing", "mirror_recovered", "mirror_skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A commit to copy: its files, and those among them that were made for the copy only. `made` counts the steps
    behind it over all stages, so that lags can be told across stages."""

    stage: str
    step: int
    made: int
    unix_s: float
    sources: tuple[Source, ...]
    scratch: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a mirror is. `stage` and `step` are of its newest commit (empty and -1 without one). Since `behind_since`
    (0: never) a newer one has been waiting; `lag_steps` lie between the two. `skipped` commits never arrived.
    `error` is what fails at the moment, since `failing_since`, after `failures` failed attempts in all. Times are
    seconds since 1970.
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


class MirrorUploader:
    """One thread that owns a mirror from its first success on.

    consumes: the newest offer; waits for: one, or the end of a pause after a failure; unblocked by: `offer`, `hurry`,
    `close`; produces: commits, `progress`, `changed()` after each change of it, and `tell(event, fields)` where
    somebody should know. At most one offer is being copied and one, the newest, is waiting. A failed copy is repeated
    after a pause that doubles up to `LONGEST_PAUSE_S`, unless a newer commit has come.
    """

    def __init__(
        self,
        open_writer: Callable[[], MirrorWriter],
        *,
        keep: int,
        tell: Callable[[str, Mapping[str, Json]], None],
        changed: Callable[[], None],
        known: Progress | None = None,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._open_writer, self._keep, self._tell, self._changed = open_writer, keep, tell, changed
        self._first_pause_s = self._pause_s = first_pause_s
        self.progress = known or Progress()
        self._writer: MirrorWriter | None = None
        self._condition = threading.Condition()
        self._current: Offer | None = None
        self._waiting: Offer | None = None
        self._waiting_since = 0.0
        self._made = self._mirrored_made = 0
        self._closing = self._hurried = False
        self._lost: TreadleError | None = None
        self._thread = threading.Thread(target=self._loop, name="mirror", daemon=True)

    def start(self) -> None:
        """Claims the mirror, and copies what is offered from then on."""
        self._thread.start()

    def offer(self, offer: Offer) -> None:
        """Takes a commit into the queue, in the place of one that waits."""
        with self._condition:
            overtaken, self._waiting = self._waiting, offer
            if overtaken is None:
                self._waiting_since = offer.unix_s
            self._made = offer.made
            self._update(
                lag_steps=offer.made - self._mirrored_made,
                behind_since=self.progress.behind_since or offer.unix_s,
            )
            self._condition.notify_all()
        if overtaken:
            self._skip(overtaken, "a newer commit was made before its turn came")
        self._changed()

    def held(self, stage: str) -> frozenset[int]:
        """The steps of commits that must stay on the disk: they are being copied, or wait for it."""
        with self._condition:
            return frozenset(o.step for o in (self._current, self._waiting) if o and o.stage == stage)

    def check(self) -> None:
        """Raises `FencedError` or `ConfigError` once it is known that the mirror belongs to somebody else, `DataError`
        that another version of Treadle wrote it."""
        if self._lost is not None:
            raise self._lost

    def hurry(self) -> None:
        """Somebody waits for the end: pauses become short from now on, the present one included."""
        with self._condition:
            self._hurried = True
            self._condition.notify_all()

    @property
    def arrived(self) -> bool:
        """Whether the newest offer is mirrored."""
        return self.over and not self.progress.behind_since

    @property
    def over(self) -> bool:
        """Whether nothing more will arrive until something is offered."""
        with self._condition:
            idle = self._current is None and self._waiting is None
        return idle or not self._thread.is_alive()

    def close(self, timeout_s: float = 1.0) -> None:
        """Ends the thread after its current request. What was not copied stays on the disk only."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _loop(self) -> None:
        try:
            while not self._closing and self._lost is None:
                self._attempt()
        except BaseException:
            self._failed("the copying thread has ended on a defect, see its traceback on stderr")
            raise
        finally:
            with self._condition:
                left = [offer for offer in (self._current, self._waiting) if offer]
                self._waiting = self._current = None
            for offer in left:
                _tidy(offer)

    def _attempt(self) -> None:
        """Claims the mirror, or waits for an offer and copies it. Every failure is one of four: of this commit's files,
        of the mirror, of its owner, or a defect."""
        try:
            if self._writer is None:
                self._writer = self._open_writer()
            elif offer := self._next():
                self._copy(self._writer, offer)
                self._writer.retain(self._keep)
            self._succeeded()
        except CheckpointError as error:
            self._drop(error.message)
        except StorageError as error:
            self._failed(error.message)
            self._rest()
        except (FencedError, ConfigError, DataError) as error:
            self._lost = error  # without a word: the folder may be another process's, too

    def _next(self) -> Offer | None:
        """The newest offer: one that waits, or the one that could not be copied. None when closing."""
        with self._condition:
            while self._waiting is None and self._current is None and not self._closing:
                self._condition.wait()
            overtaken = self._current if self._waiting else None
            if self._waiting:
                self._current, self._waiting = self._waiting, None
            offer = None if self._closing else self._current
        if overtaken:
            self._skip(overtaken, "a newer commit was made while it could not be copied")
        return offer

    def _copy(self, writer: MirrorWriter, offer: Offer) -> None:
        commit = writer.commit(offer.stage, offer.step, offer.sources)
        with self._condition:
            self._current, self._mirrored_made = None, offer.made
            self._update(
                stage=commit.stage,
                step=commit.step,
                mirrored_unix_s=commit.unix_s,
                lag_steps=self._made - offer.made,
                behind_since=self._waiting_since if self._waiting else 0.0,
                commits=self.progress.commits + 1,
            )
        self._pause_s = self._first_pause_s
        _tidy(offer)

    def _rest(self) -> None:
        """Waits before the next attempt, not for long once somebody waits for the end."""
        with self._condition:
            hurried = self._hurried
            pause_s = min(self._pause_s, HURRIED_PAUSE_S) if hurried else self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._condition.wait_for(lambda: self._closing or self._hurried != hurried, pause_s)

    def _drop(self, reason: str) -> None:
        with self._condition:
            dropped, self._current = self._current, None
        if dropped:
            self._skip(dropped, reason)
            self._changed()

    def _skip(self, offer: Offer, reason: str) -> None:
        _tidy(offer)
        with self._condition:
            self._update(skipped=self.progress.skipped + 1)
        self._tell(SKIPPED, {"commit": f"{offer.stage}, step {offer.step}", "message": reason})

    def _failed(self, message: str) -> None:
        first = not self.progress.error
        with self._condition:
            self._update(
                error=message,
                failures=self.progress.failures + 1,
                failing_since=self.progress.failing_since or time.time(),
            )
        self._changed()
        if first:
            self._tell(FAILING, {"message": message})

    def _succeeded(self) -> None:
        self._pause_s = self._first_pause_s
        before = self.progress
        with self._condition:
            self._update(error="", failing_since=0.0)
        self._changed()
        if before.error:
            seconds = round(time.time() - before.failing_since, 1)
            self._tell(RECOVERED, {"message": before.error, "seconds": seconds})

    def _update(self, **fields: Any) -> None:
        self.progress = replace(self.progress, **fields)


def _tidy(offer: Offer) -> None:
    for path in offer.scratch:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
