"""The database: SQLite in WAL mode or PostgreSQL, one way to open a transaction on either."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from jobs.nudges import Notes, notes_of

_BUSY_SECONDS = 30.0
_READ_ONLY = "widthwise_read_only"
# The second is of the file beside the log of writes, which is enlarged with it.
_SQLITE_FULL = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")
_POSTGRESQL_FULL = "53100"  # disk_full


class Database:
    """A pool of connections. Safe to share between threads, never between processes."""

    def __init__(self, url: str, *, after_commit: Callable[[Notes], None] | None = None) -> None:
        """`after_commit` gets what a transaction noted to be told; it must not wait or fail."""
        self._after_commit = after_commit
        parsed = make_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        options: dict[str, Any] = {"pool_size": 5, "max_overflow": 20}
        if self.is_sqlite:
            if parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            options["connect_args"] = {"timeout": _BUSY_SECONDS}
        else:
            options["pool_pre_ping"] = True
            options["connect_args"] = {
                "connect_timeout": 10,
                "tcp_user_timeout": 30_000,  # ms; else a silent network hangs us for minutes
                # A process that stands still in mid-transaction must not hold a row for ever.
                "options": "-c idle_in_transaction_session_timeout=60000",
            }
        # SQLite lets one write at a time, and has others ask again after naps of up to a tenth of a
        # second: in no order, and some for seconds. Threads of one process wait in line here.
        self._writing: AbstractContextManager[Any] = (
            threading.RLock() if self.is_sqlite else nullcontext()
        )
        self.engine = create_engine(parsed, **options)
        if self.is_sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        self._reader = self.engine.execution_options(**{_READ_ONLY: True})

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A session that commits once, at the end, and rolls back on an exception.

        On SQLite it holds the database's write lock from its start, so what was read in
        it still holds when it writes; on PostgreSQL `store` locks the job's row.
        """
        with self._writing, Session(self.engine, expire_on_commit=False) as session:
            with session.begin():
                yield session
            notes = notes_of(session)
        if notes is not None and self._after_commit is not None:
            self._after_commit(notes)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that only reads, and so waits for no writer."""
        with Session(self._reader, expire_on_commit=False) as session, session.begin():
            yield session

    @property
    def address(self) -> str:
        """Where it is, without its user and password."""
        url = self.engine.url
        told = URL.create(url.drivername, host=url.host, port=url.port, database=url.database)
        return told.render_as_string()

    def close(self) -> None:
        self.engine.dispose()


def is_unreachable(error: BaseException) -> bool:
    """Whether there is no connection to the database's server, or it has broken. A file of SQLite's
    is there or not: nothing is to be waited for."""
    return (
        isinstance(error, DBAPIError)
        and is_away(error)
        and not isinstance(error.orig, sqlite3.Error)
        and (error.statement is None or error.connection_invalidated)
    )


def is_away(error: BaseException) -> bool:
    """Whether the database cannot be reached, or takes nothing just now: no fault of a query."""
    if isinstance(error, InterfaceError | PoolTimeout):
        return True
    # SQLite's driver says so of a query that it does not understand as well.
    code = getattr(getattr(error, "orig", None), "sqlite_errorname", None)
    return isinstance(error, OperationalError) and code != "SQLITE_ERROR"


def is_full(error: BaseException) -> bool:
    """Whether the database has no room for what was to be written; is_away says so of it too."""
    if not isinstance(error, DBAPIError):
        return False
    return (
        getattr(error.orig, "sqlite_errorname", None) in _SQLITE_FULL
        or getattr(error.orig, "sqlstate", None) == _POSTGRESQL_FULL
    )


def now(session: Session) -> datetime:
    """The database's clock, also for leases: hosts' own clocks may disagree.

    On PostgreSQL the time of the statement and not of the transaction, which may have
    waited for a lock in between.
    """
    if session.get_bind().dialect.name == "sqlite":
        read = session.scalar(text("SELECT strftime('%Y-%m-%dT%H:%M:%f', 'now')"))
        return datetime.fromisoformat(str(read)).replace(tzinfo=UTC)
    read = session.scalar(text("SELECT clock_timestamp()"))
    assert isinstance(read, datetime)
    return read.astimezone(UTC)


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # _begin_sqlite opens the transactions
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    # Changing to WAL does not wait for other connections as other statements do.
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A deferred transaction that reads first and writes later fails at once when another
    # has written in between, whatever the busy timeout; an immediate one waits its turn.
    read_only = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
