"""Devices' latency profiles, and the one that a job selects for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from jobs.records import UtcDateTime

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# The shapes of this migration, whatever jobs.records says later.
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
TIME = UtcDateTime()


def upgrade() -> None:
    op.create_table(
        "profiles",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("summary", JSON, nullable=False),
        sa.Column("content", JSON, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_profiles_project_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_profiles")),
    )
    op.create_index(
        op.f("ix_profiles_project_id_created_at_id"),
        "profiles",
        ["project_id", "created_at", "id"],
        unique=False,
    )
    # In one statement that both databases take: SQLite adds no constraint to a table that is there.
    op.execute(
        "ALTER TABLE jobs ADD COLUMN profile_id VARCHAR(40)"
        " CONSTRAINT fk_jobs_profile_id REFERENCES profiles (id)"
    )


def downgrade() -> None:
    op.drop_column("jobs", "profile_id")
    op.drop_table("profiles")
