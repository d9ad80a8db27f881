"""The ledger's file: its tables, who may write it, and what its failures mean."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from treadle.platform.errors import LedgerError, StorageError
from treadle.platform.local_disk import sync_folder

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 5.0

_SCHEMA = """
CREATE TABLE groups (
    id TEXT PRIMARY KEY, stage TEXT NOT NULL, number INTEGER NOT NULL, prompt_id TEXT NOT NULL,
    state TEXT NOT NULL, attempts INTEGER NOT NULL, version INTEGER NOT NULL,
    oldest INTEGER, newest INTEGER, tokens INTEGER,
    scored INTEGER, failed INTEGER, timed_out INTEGER, reward REAL,
    step INTEGER, incarnation INTEGER, reason TEXT,
    closed_at INTEGER  -- the history entry that made it trained or dropped
) WITHOUT ROWID;
CREATE INDEX groups_by_step ON groups (stage, step) WHERE step IS NOT NULL;
CREATE TABLE history (
    entry INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, event TEXT NOT NULL, before TEXT,
    step INTEGER, incarnation INTEGER NOT NULL, reason TEXT, unix_s REAL NOT NULL
);
CREATE TABLE marks (
    stage TEXT NOT NULL, step INTEGER NOT NULL, cursor INTEGER NOT NULL, entry INTEGER NOT NULL,
    PRIMARY KEY (stage, step)
) WITHOUT ROWID;
CREATE TABLE writers (incarnation INTEGER PRIMARY KEY AUTOINCREMENT, unix_s REAL NOT NULL);
"""


def connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    """A connection to a ledger. A writer creates the tables where there is no file yet."""
    with explained(path):
        uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        db = sqlite3.connect(
            uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            if not read_only:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")
                _create(db, path)
            _check_version(db, path)
        except BaseException:
            db.close()
            raise
        return db


def _create(db: sqlite3.Connection, path: Path) -> None:
    db.execute("BEGIN IMMEDIATE")  # of two processes that create the file, one waits and finds it made
    if db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0:
        for statement in _SCHEMA.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    db.execute("COMMIT")
    sync_folder(path.absolute().parent)


def _check_version(db: sqlite3.Connection, path: Path) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        raise LedgerError(
            f"{path}: ledger format {version}, this version reads {SCHEMA_VERSION}.",
            "Resume the run with the version of Treadle that started it.",
        )


def become_writer(db: sqlite3.Connection, incarnation: int | None) -> int:
    """The next incarnation, which fences off all earlier ones; or a known one, if it is still the newest."""
    db.execute("BEGIN IMMEDIATE")
    try:
        newest = db.execute("SELECT COALESCE(MAX(incarnation), 0) FROM writers").fetchone()[0]
        if incarnation is None:
            newest = db.execute("INSERT INTO writers (unix_s) VALUES (?)", (time.time(),)).lastrowid
        elif incarnation != newest:
            raise LedgerError(f"writer {incarnation} of the ledger was replaced by writer {newest}.")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
    return int(newest)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns SQLite's failures into `StorageError` (the disk) and `LedgerError` (the file, other writers)."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        if name == "SQLITE_FULL":
            free = shutil.disk_usage(path.absolute().parent).free
            raise StorageError(
                f"disk full: cannot write {path}, {free} bytes are free.", "Free space, then resume."
            ) from error
        if name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")):
            raise StorageError(
                f"{path} cannot be opened or written: {error}.", "Check the disk and permissions."
            ) from error
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise LedgerError(
                f"{path} is locked by another process for more than {BUSY_TIMEOUT_S:g} s.",
                "Stop the other writer of this run.",
            ) from error
        if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
            raise LedgerError(
                f"{path} is no ledger, or is damaged: {error}.", "Restore it, or start a new run."
            ) from error
        raise
