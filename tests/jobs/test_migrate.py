from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import structlog
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.exc import DBAPIError

from jobs import access, blobs, deletion, migrate, quotas, store
from jobs.access import Actor
from jobs.db import Database, now
from jobs.devices import Device
from jobs.migrate import SchemaBusy, SchemaTooNew, require_fit, upgrade, upgrade_once_reachable
from jobs.records import DEFAULT_PROJECT, Project, Record
from jobs.roles import Role
from tests.services import free_port, new_database

NEWEST = "0009"
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


@pytest.mark.parametrize("how", ["refused", "no such database"])
def test_a_server_that_cannot_be_reached_is_asked_again_and_again(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 12:
            raise SystemExit(0)  # as the handler of a signal does

    monkeypatch.setattr(time, "sleep", pause)
    server = "postgresql+psycopg://widthwise:a-password@127.0.0.1"
    url = f"{server}:{free_port()}/x" if how == "refused" else f"{postgresql_url}/absent"
    database = Database(url)
    with structlog.testing.capture_logs() as log, pytest.raises(SystemExit):
        upgrade_once_reachable(database)
    database.close()
    assert len(log) == 12
    for line in log:
        assert line["event"] == "the database cannot be reached"
        assert line["error"]
        assert "\n" not in line["error"]
        assert "a-password" not in repr(line)
    assert pauses == [line["again_in_seconds"] for line in log]
    assert 0 < pauses[0] <= 1
    assert 15 <= max(pauses) <= 30


def test_what_is_no_absence_is_not_waited_for(
    empty_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is no database, or a migration that fails, is told at once."""
    if empty_url.startswith("sqlite"):
        path = tmp_path / "folder"
        path.mkdir()
        database = Database(f"sqlite:///{path}")
    else:
        database = Database(empty_url)
        with database.engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE jobs (id integer)")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    with pytest.raises(DBAPIError):
        upgrade_once_reachable(database)
    database.close()


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
        found = session.scalars(text("SELECT version_num FROM alembic_version")).all()
        assert found == [NEWEST]
        assert [project.id for project in session.query(Project)] == [DEFAULT_PROJECT]
    database.close()


# What the version of revision 0003 wrote: its columns alone.
OLD_INSERTS = (
    "INSERT INTO api_keys (id, project_id, name, hash, role, created_at, revoked_at)"
    " VALUES ('key_{n}', 'prj_default', 'old', '{n:064}', 'viewer', '2026-11-01 00:00:00', NULL)",
    "INSERT INTO models (id, project_id, name, size_bytes, uploads, files, info, warnings,"
    " created_at) VALUES ('mdl_{n}', 'prj_default', 'm', 1, '[]', '[]', '{{}}', '[]',"
    " '2026-11-01 00:00:00')",
    "INSERT INTO datasets (id, project_id, name, size_bytes, uploads, files, profile, warnings,"
    " created_at) VALUES ('dst_{n}', 'prj_default', 'd', 1, '[]', '[]', '{{}}', '[]',"
    " '2026-11-01 00:00:00')",
    "INSERT INTO jobs (id, project_id, name, model_id, dataset_id, spec, state, fence, attempts,"
    " cancel_requested, last_event, created_at) VALUES ('job_{n}', 'prj_default', 'j', 'mdl_{n}',"
    " 'dst_{n}', '{{\"device\": \"gpu:1\"}}', 'queued', 0, 0, false, 0, '2026-11-01 00:00:00')",
)
# A claim and the end of a run, as the workers of that version write them.
OLD_CLAIM = (
    "UPDATE jobs SET state = 'running', fence = fence + 1, attempts = attempts + 1,"
    " lease_expires_at = '2099-01-01 00:00:00', started_at = coalesce(started_at,"
    " '2026-11-01 00:00:01') WHERE id = 'job_{n}' AND state = 'queued'",
    "INSERT INTO runs (id, project_id, job_id, fence, worker, state, started_at) VALUES"
    " ('run_{n}', 'prj_default', 'job_{n}', 1, 'old', 'running', '2026-11-01 00:00:01')",
)
OLD_REQUEUE = (
    "UPDATE jobs SET state = 'queued', lease_expires_at = NULL WHERE id = 'job_{n}'",
    "UPDATE runs SET state = 'lost', ended_at = '2026-11-01 00:00:02' WHERE id = 'run_{n}'",
)


def write_as_before(database: Database, statements: tuple[str, ...], number: int) -> None:
    with database.engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement.format(n=number))


def test_data_of_the_revision_before_keeps_its_meaning_and_its_writers(empty_url: str) -> None:
    """Queues by device, priorities and limits come to a database with jobs in it, while processes
    of the version before go on writing and working."""
    database = Database(empty_url)
    upgrade(database, "0003")
    write_as_before(database, OLD_INSERTS, 1)
    write_as_before(database, OLD_INSERTS, 2)
    write_as_before(database, OLD_CLAIM, 2)
    upgrade(database)
    write_as_before(database, OLD_INSERTS, 3)
    write_as_before(database, OLD_CLAIM, 3)
    write_as_before(database, OLD_REQUEUE, 3)
    with database.transaction() as session:
        found = access.find_api_key(session, f"{1:064}", at=now(session))
        assert found is not None and found.role == Role.VIEWER
        assert store.unrouted_jobs(session) == ["job_1", "job_3"]
        for job_id in store.unrouted_jobs(session):
            store.route_job(session, job_id)
        queued = store.queued_jobs(session, devices=[Device.GPU])
        assert [job.id for job in queued] == ["job_1", "job_3"]
        assert store.expired_jobs(session) == []  # the old worker still has job_2
    for number, fence in ((1, 1), (3, 2)):
        with database.transaction() as session:
            job = store.get_job(session, f"job_{number}", project_id=DEFAULT_PROJECT)
            assert (job.name, job.precedence, job.time_limit_seconds) == ("j", 0, None)
            claim = store.claim_job(
                session, job.id, worker="new", lease_seconds=60, max_runs=3, devices=[Device.GPU]
            )
            assert claim is not None
            assert (claim.fence, claim.seconds_left) == (fence, None)
    write_as_before(database, OLD_REQUEUE, 2)  # which has lost it meanwhile
    with database.transaction() as session:
        assert store.unrouted_jobs(session) == ["job_2"]
    database.close()


def test_files_of_the_revision_before_count_and_go_as_others(empty_url: str) -> None:
    database = Database(empty_url)
    upgrade(database, "0003")
    write_as_before(database, OLD_INSERTS, 1)
    file = '{"name": "m", "key": "models/mdl_1/m", "size_bytes": 7, "sha256": "' + 64 * "a" + '"}'
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE models SET files = :files"), {"files": f"[{file}]"})
    upgrade(database)
    with database.transaction() as session:
        used = quotas.usage(session, DEFAULT_PROJECT)
        assert (used.bytes, used.uploads, used.queued_jobs) == (7, 2, 1)
        store.request_cancel(session, "job_1", project_id=DEFAULT_PROJECT)
        deletion.delete_model(session, Actor(DEFAULT_PROJECT), "mdl_1")
    with database.reading() as session:
        (blob,) = blobs.unused(session, grace_seconds=0)
        assert blob.key == "models/mdl_1/m"
    database.close()


def test_a_job_of_the_revision_before_can_be_deleted(empty_url: str) -> None:
    """Also while a process of that version still writes."""
    database = Database(empty_url)
    upgrade(database, "0003")
    write_as_before(database, OLD_INSERTS, 1)
    upgrade(database, "0007")
    write_as_before(database, OLD_INSERTS, 2)
    write_as_before(database, OLD_CLAIM, 2)
    upgrade(database)
    write_as_before(database, OLD_REQUEUE, 2)
    for job_id in ("job_1", "job_2"):
        with database.transaction() as session:
            store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)
            deletion.delete_job(session, Actor(DEFAULT_PROJECT), job_id)
    write_as_before(database, OLD_CLAIM[:1], 1)  # what it has not heard of does nothing
    with database.reading() as session:
        assert store.list_jobs(session, project_id=DEFAULT_PROJECT) == []
        found = store.unswept_deleted_jobs(session, grace_seconds=0)
        assert sorted(job.id for job in found) == ["job_1", "job_2"]
    database.close()


def test_a_migration_gives_way_to_those_who_hold_a_table(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every query of that table would wait behind it, for as long as the holder likes."""
    database = Database(new_database(postgresql_url, f"held_{secrets.token_hex(6)}"))
    upgrade(database, "0008")
    monkeypatch.setattr(migrate, "_LOCK_TIMEOUT", "50ms")
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with database.engine.begin() as holder:
        holder.exec_driver_sql("LOCK TABLE jobs IN ROW EXCLUSIVE MODE")  # as a writer does
        with pytest.raises(SchemaBusy, match="nothing was changed"):
            upgrade(database)
        assert len(pauses) == migrate._LOCK_TRIES - 1
        assert holder.scalar(text("SELECT version_num FROM alembic_version")) == "0008"
        # It comes to its end as soon as the holder does.
        monkeypatch.setattr(time, "sleep", lambda seconds: holder.rollback())
        upgrade(database)
    require_fit(database)
    with database.engine.connect() as connection:  # and leaves nobody impatient
        assert connection.scalar(text("SHOW lock_timeout")) == "0"
    database.close()


NEWER = """
revision = "{revision}"
down_revision = "{before}"
{more}

def upgrade():
    from alembic import op
    op.execute("CREATE TABLE {table} (id INTEGER)")
"""


def test_an_older_process_goes_on_until_a_revision_says_that_it_cannot(
    empty_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version with one more migration, and one with a second that breaks what was before."""
    ours = migrate._SCRIPTS
    additive, breaking = tmp_path / "additive", tmp_path / "breaking"
    for folder in (additive, breaking):
        shutil.copytree(ours, folder, ignore=shutil.ignore_patterns("__pycache__"))
    head = ScriptDirectory(str(ours)).get_current_head()
    added = NEWER.format(revision="8888", before=head, more="", table="added")
    more = "breaks_older_versions = True"
    breaks = NEWER.format(revision="9999", before="8888", more=more, table="broken")
    (additive / "versions" / "8888_additive.py").write_text(added)
    (breaking / "versions" / "8888_additive.py").write_text(added)
    (breaking / "versions" / "9999_breaking.py").write_text(breaks)
    database = Database(empty_url)

    def start(version: Path) -> None:
        """As the API and the workers of that version start, and are asked for readiness."""
        monkeypatch.setattr(migrate, "_SCRIPTS", version)
        upgrade(database)
        require_fit(database)

    def revision() -> str | None:
        with database.engine.connect() as connection:
            return str(connection.scalar(text("SELECT version_num FROM alembic_version")))

    start(ours)
    start(additive)
    assert revision() == "8888"
    start(ours)  # again, on a schema that is newer than it
    assert revision() == "8888"
    start(breaking)
    for version in (ours, additive):
        with pytest.raises(SchemaTooNew, match="a newer version"):
            start(version)
        with pytest.raises(SchemaTooNew):
            require_fit(database)
    start(breaking)
    assert revision() == "9999"
    database.close()


def test_a_process_that_is_too_old_says_so_and_touches_nothing(
    migrated_sqlite: Path, tmp_path: Path
) -> None:
    path = tmp_path / "widthwise.db"
    shutil.copy(migrated_sqlite, path)
    database = Database(f"sqlite:///{path}")
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        connection.exec_driver_sql("DELETE FROM supported_revisions")
    database.close()
    before = path.read_bytes()
    for module in ("jobs.migrate", "worker"):
        done = subprocess.run(
            [sys.executable, "-m", module],
            cwd=REPOSITORY,
            env={
                "PATH": os.environ["PATH"],
                "WIDTHWISE_DATABASE_URL": f"sqlite:///{path}",
                "WIDTHWISE_DATA_DIR": str(tmp_path / "d"),
                "WIDTHWISE_MEASURE_TRAINING": "false",
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert "the database was migrated by a newer version" in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
    assert path.read_bytes() == before


def test_every_record_carries_its_project(database: Database) -> None:
    schema = inspect(database.engine)
    of_all = {"projects", "workers", "supported_revisions", "alembic_version"}
    for table in set(schema.get_table_names()) - of_all:
        columns = {column["name"]: column for column in schema.get_columns(table)}
        assert not columns["project_id"]["nullable"], table
