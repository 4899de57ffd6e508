"""Jobs that were deleted, for their objects."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from jobs.records import UtcDateTime

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# The shape of this migration, whatever jobs.records says later.
TIME = UtcDateTime()


def upgrade() -> None:
    op.create_table(
        "deleted_jobs",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("deleted_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_deleted_jobs_project_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deleted_jobs")),
    )
    op.create_index(op.f("ix_deleted_jobs_deleted_at"), "deleted_jobs", ["deleted_at"])


def downgrade() -> None:
    op.drop_table("deleted_jobs")
