"""The jobs on disk: SQLite with a write-ahead log, the single truth about every job.

A job is accepted when its row is on the disk (``synchronous=FULL``), and each change of state is one UPDATE that names
the state before: whoever comes second changes nothing. States: queued -> running -> completed | failed | cancelled,
running -> queued when work was interrupted. The module knows no HTTP, no files of videos and no clock.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelforge.runtime.errors import OutputError
from reelforge.tools.service.problems import StoreBusyError

VERSION = 1
ENDED = ("completed", "failed", "cancelled")

_TABLES = """
CREATE TABLE jobs (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  caller TEXT NOT NULL,
  status TEXT NOT NULL CHECK (status IN ('queued', 'running', 'completed', 'failed', 'cancelled')),
  request TEXT NOT NULL,
  work REAL NOT NULL,
  priority INTEGER NOT NULL,
  deadline_s REAL,
  created_at REAL NOT NULL,
  started_at REAL,
  finished_at REAL,
  expires_at REAL,
  attempts INTEGER NOT NULL DEFAULT 0,
  crashes INTEGER NOT NULL DEFAULT 0,
  step INTEGER NOT NULL DEFAULT 0,
  error_code TEXT,
  error_message TEXT,
  hidden INTEGER NOT NULL DEFAULT 0,
  has_file INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX jobs_by_status ON jobs (status, caller);
CREATE INDEX jobs_by_caller ON jobs (caller, seq);
CREATE INDEX jobs_by_end ON jobs (finished_at) WHERE finished_at IS NOT NULL;
CREATE TABLE idempotency (
  caller TEXT NOT NULL,
  key TEXT NOT NULL,
  digest TEXT NOT NULL,
  id TEXT NOT NULL,
  PRIMARY KEY (caller, key)
) WITHOUT ROWID;
CREATE INDEX idempotency_by_id ON idempotency (id);
"""


@dataclass(frozen=True)
class Record:
    """A job's row.

    Attributes:
        seq: Counts up with every job, and is never used twice.
        id: ``video_`` and 32 hexadecimal digits.
        caller: Whose it is.
        status: Its state.
        request: What was asked for, with every default filled in.
        work: In steps times pixels.
        priority: Higher goes first.
        deadline_s: From its creation; None if it has none.
        created_at: Unix time, as all times here.
        started_at: When work began, the last time.
        finished_at: When it ended.
        expires_at: When the video is or was deleted.
        attempts: How often work has begun.
        crashes: How often the process ended meanwhile, without having been asked to.
        step: Of the sampling, when it ended.
        error_code: Why it failed, for programs.
        error_message: The same for people.
        hidden: Whether its caller has deleted it.
        has_file: Whether the video should be there.
    """

    seq: int
    id: str
    caller: str
    status: str
    request: dict[str, Any]
    work: float
    priority: int
    deadline_s: float | None
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    expires_at: float | None = None
    attempts: int = 0
    crashes: int = 0
    step: int = 0
    error_code: str | None = None
    error_message: str | None = None
    hidden: bool = False
    has_file: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing follows."""
        return self.status in ENDED


@dataclass(frozen=True)
class Full:
    """There was no place for a job.

    Attributes:
        waiting: How many wait.
        caller: Whether that is the caller's own limit.
    """

    waiting: int
    caller: bool


@dataclass(frozen=True)
class KeyReused:
    """An idempotency key came with another request than the first time."""


class Store:
    """The database. Any thread may use it; statements that write wait for each other.

    Args:
        path: The file; made if it is not there.
        busy_s: How long a statement waits for a lock that another process holds.

    Raises:
        OutputError: If it cannot be opened, or is no database of this version.
    """

    def __init__(self, path: Path, busy_s: float = 2.0) -> None:
        self._path = path
        self._writing, self._reading = threading.RLock(), threading.RLock()
        try:
            self._writer, self._reader = (self._connect(busy_s) for _ in range(2))
            self._prepare()
        except sqlite3.Error as error:
            raise OutputError(
                f"the jobs cannot be kept in {str(path)!r}: {error}.",
                expected="a database of this service, or a folder that this user may write",
                fix="choose another folder with --data, or restore the database",
            ) from error

    def close(self) -> None:
        """Close the database; closing twice is harmless."""
        with self._writing, self._reading:
            for connection in (self._reader, self._writer):
                with suppress(sqlite3.Error):
                    connection.close()

    # New jobs

    def add(
        self, record: Record, waiting: int, waiting_per_caller: int, idempotency: tuple[str, str] | None = None
    ) -> Record | Full | KeyReused:
        """Accept a job, if there is a place: when this returns its record, it is on the disk.

        Args:
            record: The job; its ``seq`` is chosen here.
            waiting: How many jobs may wait.
            waiting_per_caller: How many of one caller.
            idempotency: The caller's key, and the digest of what was asked for: who came before with the same gets the
                job of then.

        Raises:
            StoreBusyError: If the database is locked or its disk full.
        """
        with self._write() as database:
            if idempotency is not None:
                row = database.execute(
                    "SELECT digest, id FROM idempotency WHERE caller = ? AND key = ?", (record.caller, idempotency[0])
                ).fetchone()
                if row is not None:
                    known = _one(database, "id = ?", row[1])
                    return KeyReused() if row[0] != idempotency[1] or known is None else known
            own = _count(database, "status = 'queued' AND caller = ?", record.caller)
            if own >= waiting_per_caller:
                return Full(own, caller=True)
            everyone = _count(database, "status = 'queued'")
            if everyone >= waiting:
                return Full(everyone, caller=False)
            database.execute(
                "INSERT INTO jobs (id, caller, status, request, work, priority, deadline_s, created_at) "
                "VALUES (?, ?, 'queued', ?, ?, ?, ?, ?)",
                (
                    record.id,
                    record.caller,
                    json.dumps(record.request),
                    record.work,
                    record.priority,
                    record.deadline_s,
                    record.created_at,
                ),
            )
            if idempotency is not None:
                database.execute(
                    "INSERT INTO idempotency VALUES (?, ?, ?, ?)", (record.caller, *idempotency, record.id)
                )
            added = _one(database, "id = ?", record.id)
            assert added is not None
            return added

    # Changes of state; each says whether it was this call that made it

    def begin(self, job_id: str, now: float) -> int | None:
        """Note that work has begun, and return the number of the attempt; None if the job does not wait any longer."""
        with self._write() as database:
            row = database.execute(
                "UPDATE jobs SET status = 'running', started_at = ?, attempts = attempts + 1 "
                "WHERE id = ? AND status = 'queued' RETURNING attempts",
                (now, job_id),
            ).fetchone()
            return None if row is None else int(row[0])

    def complete(self, job_id: str, attempt: int, now: float, expires_at: float, step: int) -> bool:
        """Note that the video is in the store, if it is this attempt's."""
        return self._change(
            "status = 'completed', finished_at = ?, expires_at = ?, step = ?, has_file = 1",
            (now, expires_at, step),
            "id = ? AND status = 'running' AND attempts = ?",
            (job_id, attempt),
        )

    def fail(self, job_id: str, now: float, code: str, message: str, step: int = 0) -> bool:
        """Note why there will be no video."""
        return self._change(
            "status = 'failed', finished_at = ?, error_code = ?, error_message = ?, step = ?",
            (now, code, message, step),
            "id = ? AND status IN ('queued', 'running')",
            (job_id,),
        )

    def cancel(self, job_id: str, now: float, step: int = 0) -> bool:
        """Note that nobody wants the video."""
        return self._change(
            "status = 'cancelled', finished_at = ?, step = ?",
            (now, step),
            "id = ? AND status IN ('queued', 'running')",
            (job_id,),
        )

    def put_back(self, job_id: str) -> bool:
        """Return a running job to the queue, at its old place."""
        return self._change("status = 'queued', started_at = NULL", (), "id = ? AND status = 'running'", (job_id,))

    def crashed(self, job_id: str) -> bool:
        """Return a job to the queue whose process has ended without a word, and count that."""
        return self._change(
            "status = 'queued', started_at = NULL, crashes = crashes + 1",
            (),
            "id = ? AND status = 'running'",
            (job_id,),
        )

    def file_deleted(self, job_id: str, now: float) -> bool:
        """Note that a video is gone."""
        return self._change(
            "has_file = 0, expires_at = min(expires_at, ?)", (now,), "id = ? AND has_file = 1", (job_id,)
        )

    def hide(self, job_id: str) -> bool:
        """Take an ended job out of its caller's list."""
        return self._change("hidden = 1", (), "id = ? AND status NOT IN ('queued', 'running')", (job_id,))

    def forget(self, before: float) -> int:
        """Remove jobs without a video that ended before a time, and return how many."""
        with self._write() as database:
            which = "finished_at < ? AND has_file = 0 AND status NOT IN ('queued', 'running')"
            database.execute(f"DELETE FROM idempotency WHERE id IN (SELECT id FROM jobs WHERE {which})", (before,))
            return database.execute(f"DELETE FROM jobs WHERE {which}", (before,)).rowcount

    # Questions

    def get(self, job_id: str) -> Record | None:
        """Return a job."""
        with self._read() as database:
            return _one(database, "id = ?", job_id)

    def page(self, caller: str, limit: int, after: str | None) -> tuple[list[Record], bool] | None:
        """Return some of a caller's jobs, newest first, and whether more follow; None if ``after`` is not his."""
        with self._read() as database:
            seq: int | None = None
            if after is not None:
                last = _one(database, "id = ?", after)
                if last is None or last.caller != caller:
                    return None
                seq = last.seq
            rows = database.execute(
                "SELECT * FROM jobs WHERE caller = ? AND hidden = 0 AND (? IS NULL OR seq < ?) "
                "ORDER BY seq DESC LIMIT ?",
                (caller, seq, seq, limit + 1),
            ).fetchall()
            return [_record(row) for row in rows[:limit]], len(rows) > limit

    def live(self) -> list[Record]:
        """Return all jobs that have not ended, in the order in which they came."""
        with self._read() as database:
            rows = database.execute("SELECT * FROM jobs WHERE status IN ('queued', 'running') ORDER BY seq").fetchall()
            return [_record(row) for row in rows]

    def with_file(self, expired_before: float | None = None) -> list[Record]:
        """Return all jobs whose video should be there, or those whose time is over."""
        with self._read() as database:
            rows = database.execute(
                "SELECT * FROM jobs WHERE has_file = 1 AND (? IS NULL OR expires_at < ?) ORDER BY seq",
                (expired_before, expired_before),
            ).fetchall()
            return [_record(row) for row in rows]

    def newest_time(self) -> float:
        """Return the newest time in the database, which has certainly passed; 0 if it is empty."""
        with self._read() as database:
            newest = "SELECT max(max(created_at), max(ifnull(started_at, 0)), max(ifnull(finished_at, 0))) FROM jobs"
            return float(database.execute(newest).fetchone()[0] or 0.0)

    # Inside

    def _connect(self, busy_s: float) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=busy_s, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _prepare(self) -> None:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            version = self._writer.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _TABLES.split(";"):
                    self._writer.execute(statement)
                self._writer.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise sqlite3.DatabaseError(f"it has version {version}, and this program reads {VERSION}")
        except BaseException:
            self._writer.execute("ROLLBACK")
            raise
        self._writer.execute("COMMIT")

    def _change(self, changes: str, values: tuple[Any, ...], where: str, keys: tuple[Any, ...]) -> bool:
        with self._write() as database:
            return database.execute(f"UPDATE jobs SET {changes} WHERE {where}", (*values, *keys)).rowcount == 1

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._writing:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except sqlite3.OperationalError as error:
                raise _busy(error) from error
            finally:
                if self._writer.in_transaction:
                    with suppress(sqlite3.Error):
                        self._writer.execute("ROLLBACK")

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._reading:
            try:
                yield self._reader
            except sqlite3.OperationalError as error:
                raise _busy(error) from error


def _busy(error: sqlite3.OperationalError) -> StoreBusyError:
    return StoreBusyError(f"the jobs' database does not answer: {error}.", expected="a database that is not locked")


def _count(database: sqlite3.Connection, where: str, *values: str) -> int:
    return int(database.execute(f"SELECT count(*) FROM jobs WHERE {where}", values).fetchone()[0])


def _one(database: sqlite3.Connection, where: str, value: str) -> Record | None:
    row = database.execute(f"SELECT * FROM jobs WHERE {where}", (value,)).fetchone()
    return None if row is None else _record(row)


def _record(row: sqlite3.Row) -> Record:
    values = dict(row)
    values["request"] = json.loads(values["request"])
    values["hidden"], values["has_file"] = bool(values["hidden"]), bool(values["has_file"])
    return Record(**values)
