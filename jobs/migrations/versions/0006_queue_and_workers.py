"""Idempotency keys; the queue by device and priority, time limits; workers; supported
revisions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from jobs.records import UtcDateTime

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# The shapes of this migration, whatever jobs.records says later.
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
TIME = UtcDateTime()


def upgrade() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("request", sa.String(length=64), nullable=False),
        sa.Column("token", sa.String(length=40), nullable=False),
        sa.Column("held_until", TIME, nullable=True),
        sa.Column("body_sha256", sa.String(length=64), nullable=True),
        sa.Column("body_bytes", sa.BigInteger(), nullable=True),
        sa.Column("action", sa.String(length=40), nullable=True),
        sa.Column("target", sa.String(length=40), nullable=True),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("headers", JSON, nullable=True),
        sa.Column("content", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_idempotency_keys_project_id")
        ),
        sa.PrimaryKeyConstraint("project_id", "hash", name=op.f("pk_idempotency_keys")),
    )
    op.create_index(
        op.f("ix_idempotency_keys_expires_at"), "idempotency_keys", ["expires_at"], unique=False
    )
    # Null, or with a default: a process of the version before still inserts jobs without these.
    op.add_column("jobs", sa.Column("precedence", sa.Integer(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("device", sa.String(length=20), nullable=True))
    op.add_column("jobs", sa.Column("predicted_seconds", sa.Double(), nullable=True))
    op.add_column("jobs", sa.Column("time_limit_seconds", sa.Double(), nullable=True))
    op.add_column("jobs", sa.Column("retried_at", TIME, nullable=True))
    op.create_index(
        op.f("ix_jobs_state_device_precedence_created_at_id"),
        "jobs",
        ["state", "device", "precedence", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        op.f("ix_jobs_state_device_finished_at"),
        "jobs",
        ["state", "device", "finished_at"],
        unique=False,
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("gpus", sa.Integer(), nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("seen_at", TIME, nullable=False),
        sa.Column("lease_expires_at", TIME, nullable=False),
        sa.Column("drain_requested_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
        sa.UniqueConstraint("name", name=op.f("uq_workers_name")),
    )
    op.create_table(
        "supported_revisions",
        sa.Column("revision", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("revision", name=op.f("pk_supported_revisions")),
    )


def downgrade() -> None:
    op.drop_table("supported_revisions")
    op.drop_table("workers")
    op.drop_index(op.f("ix_jobs_state_device_finished_at"), "jobs")
    op.drop_index(op.f("ix_jobs_state_device_precedence_created_at_id"), "jobs")
    for column in ("retried_at", "time_limit_seconds", "predicted_seconds", "device", "precedence"):
        op.drop_column("jobs", column)
    op.drop_table("idempotency_keys")
