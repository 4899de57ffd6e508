"""`python -m jobs.migrate`: brings the database to the newest schema.

Safe to run many times at once: whoever comes second waits, and finds nothing to do.
`python -m jobs.migrate --new MESSAGE` writes a migration from the changed records.

A migration may run while processes of the versions before still work on the database, and one of
these may be started again afterwards: it finds a revision that it does not know, and in the table
`supported_revisions` whether it may go on. So a migration adds alone: see CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, delete, insert, inspect, select, text
from sqlalchemy.exc import DBAPIError, OperationalError

from jobs.db import Database, is_unreachable
from jobs.errors import JobsError
from jobs.records import SupportedRevision
from jobs.settings import get_settings

_SCRIPTS = Path(__file__).with_name("migrations")
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0
_LOCK_TIMEOUT = "5s"  # whoever asks after us for a table that we wait for waits too
_LOCK_TRIES = 6
_LOCK_PAUSE_SECONDS = 5.0
_LOCK_NOT_AVAILABLE = "55P03"
_LOCK = 0x5769_6474_6877_6973  # any fixed number that nobody else locks in this database


_log = structlog.get_logger(__name__)


class SchemaUnfit(JobsError):
    """The database's schema is not one that this process can work with."""

    code = "schema-unfit"


class SchemaTooNew(SchemaUnfit):
    """A newer version has migrated the database, and changed what this one relies on."""

    code = "schema-too-new"

    def __init__(self) -> None:
        super().__init__(
            "the database was migrated by a newer version, which this one does not work with: "
            "start that version here"
        )


class SchemaBusy(JobsError):
    """Other sessions hold locks on what a migration has to change."""

    code = "schema-busy"

    def __init__(self) -> None:
        super().__init__(
            "the migration gave way to other sessions, which kept holding locks on its tables: "
            "end long transactions (a dump, a forgotten psql) and run it again; nothing was changed"
        )


def upgrade(database: Database, revision: str = "head") -> None:
    """All migrations up to `revision` in one transaction, under a lock. Where a newer version has
    gone further, nothing, if this one still works with that; else SchemaTooNew. SchemaBusy where
    others keep a table from it for too long."""
    for tries_left in reversed(range(_LOCK_TRIES)):
        try:
            _upgrade(database, revision)
            return
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                raise
            if tries_left == 0:
                raise SchemaBusy from error
            _log.warning("a migration waits for a lock of others", tries_left=tries_left)
        time.sleep(_LOCK_PAUSE_SECONDS)


def _upgrade(database: Database, revision: str) -> None:
    # On SQLite the transaction itself is the lock: it begins as an immediate one.
    with database.engine.begin() as connection:
        if not database.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            # From here on: another migration may take as long as it needs.
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'")
        config = _config()
        script = ScriptDirectory.from_config(config)
        if _is_newer(connection, script):
            _require_support(connection, script)
            return
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        if revision == "head":
            _tell_supported(connection, script)


def upgrade_once_reachable(database: Database) -> None:
    """`upgrade`, for processes that start: while the database cannot be reached they say so in a
    line, and try again after longer and longer pauses. A signal whose handler raises ends it at
    once."""
    pause = _FIRST_PAUSE_SECONDS
    while True:
        try:
            upgrade(database)
            return
        except DBAPIError as error:
            if not is_unreachable(error):
                raise
            seconds = round(random.uniform(0.5, 1) * pause, 1)  # or all would come at once
            _log.warning(
                "the database cannot be reached",
                database=database.address,
                again_in_seconds=seconds,
                error=" ".join(str(error.orig).split()),
            )
        time.sleep(seconds)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def require_fit(database: Database) -> None:
    """SchemaUnfit where the database is not migrated, or too far."""
    script = ScriptDirectory.from_config(_config())
    with database.engine.connect() as connection:
        if _is_newer(connection, script):
            _require_support(connection, script)
        elif _revision_of(connection) != script.get_current_head():
            raise SchemaUnfit("not migrated; run python -m jobs.migrate")


def _revision_of(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _is_newer(connection: Connection, script: ScriptDirectory) -> bool:
    """Whether the database has a revision that this version does not know."""
    found = _revision_of(connection)
    return found is not None and found not in {each.revision for each in script.walk_revisions()}


def _require_support(connection: Connection, script: ScriptDirectory) -> None:
    if inspect(connection).has_table(SupportedRevision.__tablename__):
        ours = select(SupportedRevision).where(
            SupportedRevision.revision == script.get_current_head()
        )
        if connection.execute(ours).first() is not None:
            return
    raise SchemaTooNew


def _tell_supported(connection: Connection, script: ScriptDirectory) -> None:
    """Writes down whose processes may go on working: those of the newest revision and of all that
    came before it, back to the newest one that says `breaks_older_versions`."""
    supported = []
    for each in script.walk_revisions():  # newest first
        supported.append(each.revision)
        if getattr(each.module, "breaks_older_versions", False):
            break
    told = set(connection.scalars(select(SupportedRevision.revision)))
    if told != set(supported):
        connection.execute(delete(SupportedRevision))
        connection.execute(insert(SupportedRevision), [{"revision": each} for each in supported])


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.migrate", description=__doc__)
    parser.add_argument("--new", metavar="MESSAGE", help="write a migration; needs a database")
    arguments = parser.parse_args()
    database = Database(get_settings().database_url)
    try:
        upgrade(database)
    except (SchemaTooNew, SchemaBusy) as error:
        database.close()
        sys.exit(error.message)
    try:
        if arguments.new:
            with database.engine.begin() as connection:
                config = _config()
                config.attributes["connection"] = connection
                command.revision(config, message=arguments.new, autogenerate=True)
    finally:
        database.close()


if __name__ == "__main__":
    main()
