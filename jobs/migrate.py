"""`python -m jobs.migrate`: brings the database to the newest schema.

Safe to run many times at once: whoever comes second waits, and finds nothing to do.
`python -m jobs.migrate --new MESSAGE` writes a migration from the changed records.

A migration may run while processes of the version before still work on the database. So it
adds alone: tables, and columns that are null or have a default with the meaning that a row had
before there was such a column. What nothing uses any more is dropped by a later version. So
processes of the version before may also be started again, on a database that is ahead of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from jobs.db import Database
from jobs.settings import get_settings

_SCRIPTS = Path(__file__).with_name("migrations")
_LOCK = 0x5769_6474_6877_6973  # any fixed number that nobody else locks in this database

log = structlog.get_logger(__name__)


def upgrade(database: Database, revision: str = "head") -> None:
    """All migrations up to `revision` in one transaction, under a lock; none where a newer version
    has been at work already."""
    # On SQLite the transaction itself is the lock: it begins as an immediate one.
    with database.engine.begin() as connection:
        if not database.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        if newer := _applied(connection) - _known():
            log.warning("the database is of a newer version", revisions=sorted(newer))
            return
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def is_behind(connection: Connection) -> bool:
    """Whether a migration of this version has not been applied."""
    applied = _applied(connection)
    heads = set(ScriptDirectory.from_config(_config()).get_heads())
    return applied != heads and applied <= _known()


def _applied(connection: Connection) -> set[str]:
    return set(MigrationContext.configure(connection).get_current_heads())


def _known() -> set[str]:
    scripts = ScriptDirectory.from_config(_config())
    return {script.revision for script in scripts.walk_revisions()}


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
        if arguments.new:
            with database.engine.begin() as connection:
                config = _config()
                config.attributes["connection"] = connection
                command.revision(config, message=arguments.new, autogenerate=True)
    finally:
        database.close()


if __name__ == "__main__":
    main()
