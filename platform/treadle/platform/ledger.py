"""The ledger: what became of every prompt group, so that none is lost and none is trained twice.

A group walks   issued -> drawn -> scored -> leased(step, incarnation) -> trained
                   \\________\\________\\________\\_> dropped(reason)
and from any state back to `returned` when a run is rolled back to a mark; a returned group may be issued
again.

One SQLite file in WAL mode, one writer. Opening a ledger to write bumps its incarnation and thereby fences
off every earlier writer: a driver that was frozen and comes back gets `LedgerError` instead of writing.
Ordinary transitions are not synced (they cost microseconds; a power cut may forget the newest of them, and
rolling back to a mark forgets them anyway). A mark is synced: the file knows it, and everything before it,
for good.

The order around a checkpoint is: shards, then `commit_mark`, then the checkpoint's COMMITTED marker. Whatever
dies in between, the newest committed checkpoint has its mark.
"""

from __future__ import annotations

import math
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from treadle.platform.errors import FencedError, LedgerError
from treadle.platform.ledger_audit import LedgerAudit, read_audit
from treadle.platform.ledger_file import become_writer, connect, explained

OPEN_STATES = ("issued", "drawn", "scored", "leased")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A point a stage can be rolled back to: `step` steps are trained, prompts before `cursor` were
    issued."""

    stage: str
    step: int
    cursor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """Where a rolled-back stage goes on: at `step`, with the groups numbered `pending` (issued before the
    mark and not finished then, or undone since), and then with those from `cursor` on."""

    step: int
    cursor: int
    pending: tuple[int, ...]


class Ledger:
    """Open it with `Ledger.open`; close it, or use it in a `with` block. Methods may be called from several
    threads. Every method is one transaction; `with ledger.batch():` makes several calls one."""

    def __init__(self, path: Path, connection: sqlite3.Connection, incarnation: int) -> None:
        self.path, self.incarnation = path, incarnation
        self._db = connection
        self._lock = threading.RLock()
        self._depth = 0

    @classmethod
    def open(cls, path: str | Path, *, incarnation: int | None = None, read_only: bool = False) -> Ledger:
        """Opens or creates the file as its only writer, with the next incarnation (or, to go on as a known
        writer, with that one). `read_only` neither creates nor fences. Raises `LedgerError` for a file that
        is no ledger or is locked, `StorageError` for a full or missing disk."""
        path = Path(path)
        db = connect(path, read_only=read_only)
        try:
            with explained(path):
                return cls(path, db, 0 if read_only else become_writer(db, incarnation))
        except BaseException:
            db.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """One transaction around several calls: all of them happen, or none."""
        with self._lock, explained(self.path):
            if self._depth:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            self._depth = 1
            try:
                self._refuse_if_fenced()
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            finally:
                self._depth = 0

    def _refuse_if_fenced(self) -> None:
        if self.incarnation == 0:
            raise LedgerError(f"{self.path} was opened to read.", "Open it without read_only to write.")
        newest = self._db.execute("SELECT MAX(incarnation) FROM writers").fetchone()[0]
        if newest != self.incarnation:
            raise FencedError(
                f"{self.path}: this is writer {self.incarnation}, writer {newest} has taken over.",
                "Stop this process; the newer one continues the run.",
            )

    def check_held(self) -> None:
        """Raises `FencedError` if another writer has taken over. For whoever is about to write beside the ledger."""
        with self.batch():
            return

    def issue(self, id: str, prompt_id: str, version: int) -> None:
        """A group is about to be drawn with weights of `version`: a new one, or a returned one again. The id
        is `<stage>/<number>`, the number with 8 digits."""
        stage, _, number = id.rpartition("/")
        if not stage or not number.isdecimal() or number != f"{int(number):08d}":
            raise LedgerError(f"group id {id!r} is not <stage>/<number with 8 digits>.")
        with self.batch():
            row = self._db.execute("SELECT state, prompt_id FROM groups WHERE id = ?", (id,)).fetchone()
            if row is None:
                self._db.execute(
                    "INSERT INTO groups (id, stage, number, prompt_id, state, attempts, version) "
                    "VALUES (?, ?, ?, ?, 'issued', 1, ?)",
                    (id, stage, int(number), prompt_id, version),
                )
            elif row != ("returned", prompt_id):
                held = f"it is {row[0]}, for prompt {row[1]}"
                raise LedgerError(f"group {id} cannot be issued for prompt {prompt_id}: {held}.")
            else:
                self._db.execute(
                    "UPDATE groups SET state = 'issued', attempts = attempts + 1, version = ? WHERE id = ?",
                    (version, id),
                )
                self._note([id], "issued", before="returned")

    def drawn(self, id: str, oldest: int, newest: int, tokens: int) -> None:
        """A worker drew it, with weights between two versions; `tokens` over all samples."""
        self._move(
            [(oldest, newest, tokens, id)],
            "drawn",
            ("issued",),
            "state = 'drawn', oldest = ?, newest = ?, tokens = ?",
        )

    def scored(
        self, id: str, *, scored: int, failed: int, timed_out: int, mean_reward: float = math.nan
    ) -> None:
        """It was judged: how many samples have a reward, how many verdicts failed or came too late."""
        reward = None if math.isnan(mean_reward) else mean_reward
        assignments = "state = 'scored', scored = ?, failed = ?, timed_out = ?, reward = ?"
        self._move([(scored, failed, timed_out, reward, id)], "scored", ("drawn",), assignments)

    def lease(self, ids: Sequence[str], step: int) -> None:
        """The learner is about to train these in `step`. Refused where the stage has trained that step."""
        with self.batch():
            for stage in {id.rpartition("/")[0] for id in ids}:
                self._refuse_trained(stage, step)
            rows = [(step, self.incarnation, id) for id in ids]
            self._move(rows, "leased", ("scored",), "state = 'leased', step = ?, incarnation = ?")

    def _refuse_trained(self, stage: str, step: int) -> None:
        query = "SELECT id FROM groups WHERE stage = ? AND step = ? AND state = 'trained' LIMIT 1"
        row = self._db.execute(query, (stage, step)).fetchone()
        if row:
            raise LedgerError(f"step {step} of {stage} is trained already, e.g. with group {row[0]}.")

    def trained(self, stage: str, step: int) -> list[str]:
        """The step happened: all groups leased for it are trained, at once. Returns their ids."""
        with self.batch():
            query = "SELECT id, incarnation FROM groups WHERE stage = ? AND step = ? AND state = 'leased'"
            rows = self._db.execute(query, (stage, step)).fetchall()
            foreign = [id for id, owner in rows if owner != self.incarnation]
            if foreign or not rows:
                reason = (
                    f"group {foreign[0]} is leased by another writer"
                    if foreign
                    else "nothing is leased for it"
                )
                raise LedgerError(
                    f"step {step} of {stage} cannot be trained: {reason}.", "Roll back to the last mark."
                )
            ids = [id for id, _ in rows]
            entry = self._note(ids, "trained", before="leased", step=step)
            self._move(
                [(entry, id) for id in ids], "trained", ("leased",), "state = 'trained', closed_at = ?"
            )
            return ids

    def drop(self, ids: Sequence[str], reason: str) -> None:
        """These will not be trained, for good, and the reason is counted."""
        if not reason:
            raise LedgerError(f"groups {', '.join(ids[:3])} cannot be dropped without a reason.")
        with self.batch():
            entry = self._note(ids, "dropped", reason=reason)
            rows = [(reason, entry, id) for id in ids]
            self._move(rows, "dropped", OPEN_STATES, "state = 'dropped', reason = ?, closed_at = ?")

    def _move(
        self, rows: Sequence[tuple[object, ...]], to: str, origins: Sequence[str], assignments: str
    ) -> None:
        """Updates groups (the last item of a row is the id) that are in one of the origin states."""
        states = ", ".join(f"'{state}'" for state in origins)
        with self.batch():
            done = self._db.executemany(
                f"UPDATE groups SET {assignments} WHERE id = ? AND state IN ({states})", rows
            )
            if done.rowcount != len(rows):
                raise self._refusal([str(row[-1]) for row in rows], to, origins)

    def _refusal(self, ids: Sequence[str], to: str, origins: Sequence[str]) -> LedgerError:
        with_copies = sorted({id for id in ids if ids.count(id) > 1})
        if with_copies:
            return LedgerError(f"group {with_copies[0]} is named twice in one call for {to}.")
        for id in ids:
            row = self._db.execute("SELECT state FROM groups WHERE id = ?", (id,)).fetchone()
            # The statement may have moved some of the rows before it met the one it could not move.
            if row is None or row[0] not in (*origins, to):
                state = row[0] if row else "unknown"
                return LedgerError(
                    f"group {id} cannot become {to}: it is {state}, not {' or '.join(origins)}."
                )
        return LedgerError(f"a group among {', '.join(ids[:3])} is {to} already.")

    def _note(
        self,
        ids: Sequence[str],
        event: str,
        *,
        before: str | None = None,
        step: int | None = None,
        reason: str | None = None,
    ) -> int:
        """Adds history entries and returns the number of the last one."""
        now = time.time()
        self._db.executemany(
            "INSERT INTO history (id, event, before, step, incarnation, reason, unix_s) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(id, event, before, step, self.incarnation, reason, now) for id in ids],
        )
        return self._last_entry()

    def _last_entry(self) -> int:
        return int(self._db.execute("SELECT COALESCE(MAX(entry), 0) FROM history").fetchone()[0])

    def commit_mark(self, stage: str, step: int, cursor: int) -> Mark:
        """Makes all that happened so far survive a power cut, as the point that `rollback_to` can return to.
        Call it when the checkpoint's shards are written and before its marker is. Refused while a group of an
        earlier step is leased, and for a step before the newest mark; the same mark again changes nothing."""
        with self._synced():
            newest = self._newest_mark(stage)
            if newest and (step < newest.step or (step == newest.step and cursor != newest.cursor)):
                raise LedgerError(
                    f"mark {step} of {stage} (cursor {cursor}) comes after mark {newest.step} "
                    f"(cursor {newest.cursor}).",
                    "Roll back before marking an earlier point.",
                )
            query = "SELECT id FROM groups WHERE stage = ? AND step < ? AND state = 'leased' LIMIT 1"
            row = self._db.execute(query, (stage, step)).fetchone()
            if row:
                raise LedgerError(
                    f"mark {step} of {stage}: group {row[0]} of an earlier step is leased, not trained."
                )
            self._db.execute(
                "INSERT OR IGNORE INTO marks (stage, step, cursor, entry) VALUES (?, ?, ?, ?)",
                (stage, step, cursor, self._last_entry()),
            )
            return Mark(stage=stage, step=step, cursor=cursor)

    def rollback_to(self, stage: str, step: int) -> Restored:
        """Returns every group of the stage that the checkpoint of `step` does not know as finished:
        unfinished ones, and those trained or dropped after the mark. Later marks are forgotten. Step 0 needs
        no mark: it is the stage's beginning."""
        with self._synced():
            mark = self._db.execute(
                "SELECT cursor, entry FROM marks WHERE stage = ? AND step = ?", (stage, step)
            ).fetchone()
            if mark is None and step:
                known = ", ".join(str(m.step) for m in self.marks(stage)) or "none"
                raise LedgerError(
                    f"{self.path}: no mark {step} of {stage}; known: {known}.",
                    "The ledger and the checkpoints are of different runs.",
                )
            cursor, entry = mark or (0, 0)
            self._return_after(stage, entry)
            self._db.execute("DELETE FROM marks WHERE stage = ? AND step > ?", (stage, step))
            returned = "stage = ? AND state = 'returned' AND number < ?"
            query = f"SELECT number FROM groups WHERE {returned} ORDER BY number"
            pending = tuple(number for (number,) in self._db.execute(query, (stage, cursor)))
            return Restored(step=step, cursor=cursor, pending=pending)

    def _return_after(self, stage: str, entry: int) -> None:
        undone = "stage = ? AND state <> 'returned' AND (closed_at IS NULL OR closed_at > ?)"
        rows = self._db.execute(f"SELECT state, id FROM groups WHERE {undone}", (stage, entry)).fetchall()
        for state in {state for state, _ in rows}:
            self._note([id for origin, id in rows if origin == state], "returned", before=state)
        self._db.executemany(
            "UPDATE groups SET state = 'returned', oldest = NULL, newest = NULL, tokens = NULL, "
            "scored = NULL, failed = NULL, timed_out = NULL, reward = NULL, step = NULL, "
            "incarnation = NULL, reason = NULL, closed_at = NULL WHERE id = ?",
            [(id,) for _, id in rows],
        )

    @contextmanager
    def _synced(self) -> Iterator[None]:
        """A transaction whose commit reaches the disk, with all commits before it."""
        with self._lock, explained(self.path):
            if self._depth:
                raise LedgerError("a mark or a rollback cannot be part of a batch.")
            self._db.execute("PRAGMA synchronous = FULL")
            try:
                with self.batch():
                    yield
            finally:
                self._db.execute("PRAGMA synchronous = NORMAL")

    def marks(self, stage: str) -> list[Mark]:
        """The marks of a stage, oldest first."""
        query = "SELECT step, cursor FROM marks WHERE stage = ? ORDER BY step"
        rows = self._db.execute(query, (stage,)).fetchall()
        return [Mark(stage=stage, step=step, cursor=cursor) for step, cursor in rows]

    def _newest_mark(self, stage: str) -> Mark | None:
        marks = self.marks(stage)
        return marks[-1] if marks else None

    def trained_ids(self, stage: str) -> dict[int, list[str]]:
        """The surviving lineage: the groups each step was trained with, in order of steps."""
        query = "SELECT step, id FROM groups WHERE stage = ? AND state = 'trained' ORDER BY step, number"
        steps: dict[int, list[str]] = {}
        with self._lock, explained(self.path):
            for step, id in self._db.execute(query, (stage,)):
                steps.setdefault(step, []).append(id)
        return steps

    def versions_trained(self, stage: str) -> list[tuple[int, int, int]]:
        """Of every trained group its step, and the oldest and the newest version that it was drawn with."""
        query = (
            "SELECT step, oldest, newest FROM groups WHERE stage = ? AND state = 'trained' ORDER BY number"
        )
        with self._lock, explained(self.path):
            return self._db.execute(query, (stage,)).fetchall()

    def audit(self, stage: str | None = None) -> LedgerAudit:
        """The account of one stage, or of all."""
        with self._lock, explained(self.path):
            return read_audit(self._db, stage)

    def snapshot(self, target: Path) -> None:
        """Writes a consistent copy of the ledger to a new file, e.g. to mirror it with a checkpoint. Others may go on
        writing meanwhile."""
        with (
            explained(target),
            closing(connect(self.path, read_only=True)) as source,
            closing(sqlite3.connect(target)) as copy,
        ):
            source.backup(copy)
