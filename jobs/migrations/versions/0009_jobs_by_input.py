"""Indexes of jobs by what they need: retention and deletion ask for them, in every pass."""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for column in ("model_id", "dataset_id", "profile_id"):
        op.create_index(op.f(f"ix_jobs_{column}"), "jobs", [column])


def downgrade() -> None:
    for column in ("profile_id", "dataset_id", "model_id"):
        op.drop_index(op.f(f"ix_jobs_{column}"), "jobs")
