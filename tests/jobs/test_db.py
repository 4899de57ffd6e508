from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import text

from jobs.db import Database, now
from jobs.records import Project


def test_a_failed_transaction_leaves_nothing(database: Database) -> None:
    with pytest.raises(RuntimeError), database.transaction() as session:
        session.add(Project(id="prj_x", name="x", created_at=now(session)))
        session.flush()
        raise RuntimeError
    with database.reading() as session:
        assert session.get(Project, "prj_x") is None


def test_sqlite_readers_do_not_wait_for_a_writer(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    with database.transaction() as session:
        session.execute(text("CREATE TABLE t (n INTEGER)"))
    with database.transaction() as writer:
        writer.execute(text("INSERT INTO t VALUES (1)"))
        with database.reading() as reader:  # would wait for the busy timeout, then fail
            assert reader.scalar(text("SELECT count(*) FROM t")) == 0
    database.close()


def test_sqlite_transactions_that_read_then_write_wait_their_turn(tmp_path: Path) -> None:
    """Deferred transactions would fail here with "database is locked"."""
    url = f"sqlite:///{tmp_path / 'a.db'}"
    databases = [Database(url) for _ in range(4)]
    with databases[0].transaction() as session:
        session.execute(text("CREATE TABLE t (n INTEGER)"))
        session.execute(text("INSERT INTO t VALUES (0)"))
    errors: list[Exception] = []

    def count(database: Database) -> None:
        try:
            for _ in range(20):
                with database.transaction() as session:
                    n = session.scalar(text("SELECT n FROM t"))
                    session.execute(text("UPDATE t SET n = :n"), {"n": n + 1})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=count, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with databases[0].reading() as session:
        assert session.scalar(text("SELECT n FROM t")) == 80
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
    for database in databases:
        database.close()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        (
            "postgresql+psycopg://a-user:a-password@db.example:5433/w?sslpassword=secret",
            "postgresql+psycopg://db.example:5433/w",
        ),
        (
            "postgresql+psycopg://a-user@/w?host=/run/pg&password=secret",
            "postgresql+psycopg:///w",
        ),
    ],
)
def test_the_address_of_a_database_tells_no_secret(url: str, address: str) -> None:
    database = Database(url)
    assert database.address == address
    database.close()
