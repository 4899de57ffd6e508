from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from jobs import access, store
from jobs.db import Database, now
from jobs.migrate import upgrade
from jobs.records import DEFAULT_PROJECT, Project, Record
from jobs.roles import Role
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
        assert session.scalars(text("SELECT version_num FROM alembic_version")).all() == ["0004"]
        assert [project.id for project in session.query(Project)] == [DEFAULT_PROJECT]
    database.close()


# What the version of revision 0002 wrote: its columns alone.
OLD_INSERTS = (
    "INSERT INTO api_keys (id, project_id, name, hash, created_at, revoked_at)"
    " VALUES ('key_{n}', 'prj_default', 'old', '{n:064}', '2026-11-01 00:00:00', NULL)",
    "INSERT INTO models (id, project_id, name, size_bytes, uploads, files, info, warnings,"
    " created_at) VALUES ('mdl_{n}', 'prj_default', 'm', 1, '[]', '[]', '{{}}', '[]',"
    " '2026-11-01 00:00:00')",
    "INSERT INTO datasets (id, project_id, name, size_bytes, uploads, files, profile, warnings,"
    " created_at) VALUES ('dst_{n}', 'prj_default', 'd', 1, '[]', '[]', '{{}}', '[]',"
    " '2026-11-01 00:00:00')",
    "INSERT INTO jobs (id, project_id, name, model_id, dataset_id, spec, state, fence, attempts,"
    " cancel_requested, last_event, created_at) VALUES ('job_{n}', 'prj_default', 'j', 'mdl_{n}',"
    " 'dst_{n}', '{{}}', 'queued', 0, 0, false, 0, '2026-11-01 00:00:00')",
)


def insert_as_before(database: Database, number: int) -> None:
    with database.engine.begin() as connection:
        for statement in OLD_INSERTS:
            connection.exec_driver_sql(statement.format(n=number))


def test_data_of_the_revision_before_keeps_its_meaning_and_its_writers(empty_url: str) -> None:
    """Roles come to a database with keys and jobs in it, while processes of the version before
    go on writing."""
    database = Database(empty_url)
    upgrade(database, "0002")
    insert_as_before(database, 1)
    upgrade(database)
    insert_as_before(database, 2)
    with database.transaction() as session:
        for number in (1, 2):
            found = access.find_api_key(session, f"{number:064}", at=now(session))
            assert found is not None
            assert found.role == Role.ADMIN  # as it could do everything before
            assert (found.expires_at, found.last_used_at) == (None, None)
            assert store.get_job(session, f"job_{number}", project_id=DEFAULT_PROJECT).name == "j"
            claim = store.claim_job(
                session, f"job_{number}", worker="w", lease_seconds=60, max_runs=3
            )
            assert claim is not None
    database.close()


def test_every_record_carries_its_project(database: Database) -> None:
    schema = inspect(database.engine)
    for table in set(schema.get_table_names()) - {"projects", "alembic_version"}:
        columns = {column["name"]: column for column in schema.get_columns(table)}
        assert not columns["project_id"]["nullable"], table
