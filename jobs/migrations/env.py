"""Runs the migrations on the connection, and in the transaction, that jobs.migrate opened."""

from __future__ import annotations

from alembic import context

from jobs.records import Record

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Record.metadata,
    transactional_ddl=True,
    render_as_batch=True,  # SQLite alters a table by making it anew
)
context.run_migrations()
