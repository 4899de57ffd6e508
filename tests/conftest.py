"""Fixtures that every part of the tests may use: real servers, a migrated database."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from sqlalchemy import delete, text

from jobs import quotas
from jobs.artifacts import ObjectStore, open_store
from jobs.db import Database
from jobs.migrate import upgrade
from jobs.records import DEFAULT_PROJECT, Project, Record
from tests import services


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis of this test session."""
    with services.redis_server() as url:
        yield url


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A PostgreSQL of this test session, without a database's name."""
    with services.postgresql_server() as url:
        yield url


@pytest.fixture(scope="session")
def s3_variables() -> Iterator[dict[str, str]]:
    """The environment by which an S3 server of this test session is found."""
    with services.s3_server() as variables:
        yield variables


@pytest.fixture
def s3_url(s3_variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place in a bucket of that server."""
    for name, value in s3_variables.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{secrets.token_hex(8)}"


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the newest schema, to be copied."""
    path = tmp_path_factory.mktemp("schema") / "widthwise.db"
    database = Database(f"sqlite:///{path}")
    upgrade(database)
    database.close()
    return path


@pytest.fixture(scope="session")
def migrated_postgresql(postgresql_url: str) -> str:
    """The URL of a database with the newest schema, to be emptied before each test."""
    url = services.new_database(postgresql_url, "migrated")
    database = Database(url)
    upgrade(database)
    database.close()
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database with the newest schema: the test runs once on SQLite, once on PostgreSQL."""
    if request.param == "sqlite":
        path = tmp_path / "widthwise.db"
        shutil.copy(request.getfixturevalue("migrated_sqlite"), path)
        return f"sqlite:///{path}"
    url = str(request.getfixturevalue("migrated_postgresql"))
    database = Database(url)
    with database.transaction() as session:
        tables = ", ".join(set(Record.metadata.tables) - {"projects"})
        session.execute(text(f"TRUNCATE {tables}"))
        session.execute(delete(Project).where(Project.id != DEFAULT_PROJECT))
        quotas.set_quotas(session.get_one(Project, DEFAULT_PROJECT), asdict(quotas.Quotas()))
    database.close()
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    return open_store((tmp_path / "objects").as_uri())
