from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from jobs.db import Database
from jobs.migrate import upgrade
from jobs.records import DEFAULT_PROJECT, Project, Record
from tests.services import new_database

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'not' / 'there yet' / 'widthwise.db'}"
    server = request.getfixturevalue("postgresql_url")
    return new_database(server, f"empty_{secrets.token_hex(6)}")


def test_the_migrations_make_what_the_records_say(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, Record.metadata) == []


def test_many_upgrade_at_once(empty_url: str, tmp_path: Path) -> None:
    """Processes as on a real start: the API and several workers."""
    environment = {"WIDTHWISE_DATABASE_URL": empty_url, "WIDTHWISE_DATA_DIR": str(tmp_path / "d")}
    racers = [
        subprocess.Popen(
            [sys.executable, "-m", "jobs.migrate"],
            cwd=REPOSITORY,
            env=environment,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for racer in racers:
        _, errors = racer.communicate(timeout=60)
        assert racer.returncode == 0, errors.decode()
    database = Database(empty_url)
    upgrade(database)  # and once more
    with database.reading() as session:
        assert session.scalars(text("SELECT version_num FROM alembic_version")).all() == ["0002"]
        assert [project.id for project in session.query(Project)] == [DEFAULT_PROJECT]
    database.close()


def test_every_record_carries_its_project(database: Database) -> None:
    schema = inspect(database.engine)
    for table in set(schema.get_table_names()) - {"projects", "alembic_version"}:
        columns = {column["name"]: column for column in schema.get_columns(table)}
        assert not columns["project_id"]["nullable"], table
