"""Resumable uploads, blobs that models and datasets share, quotas, deletion."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from jobs.records import UtcDateTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# The shapes of this migration, whatever jobs.records says later.
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
TIME = UtcDateTime()


def upgrade() -> None:
    op.add_column("projects", sa.Column("quota_bytes", sa.BigInteger(), nullable=True))
    for name in ("quota_uploads", "quota_running_jobs", "quota_queued_jobs"):
        op.add_column("projects", sa.Column(name, sa.Integer(), nullable=True))
    for table in ("models", "datasets", "artifacts"):
        op.add_column(table, sa.Column("deleted_at", TIME, nullable=True))
    op.create_index(op.f("ix_artifacts_project_id"), "artifacts", ["project_id"], unique=False)
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("key_id", sa.String(length=40), nullable=True),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("filename", sa.String(length=200), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=True),
        sa.Column("metadata_sent", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.Column("finished_at", TIME, nullable=True),
        sa.Column("record_id", sa.String(length=40), nullable=True),
        sa.Column("error", JSON, nullable=True),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_uploads_project_id")
        ),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("fk_uploads_key_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_uploads")),
    )
    op.create_index(
        op.f("ix_uploads_project_id_finished_at"),
        "uploads",
        ["project_id", "finished_at"],
        unique=False,
    )
    op.create_index(op.f("ix_uploads_expires_at"), "uploads", ["expires_at"], unique=False)
    blobs = op.create_table(
        "blobs",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("wanted_at", TIME, nullable=False),
        sa.Column("stored_at", TIME, nullable=True),
        sa.Column("doomed", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_blobs_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_blobs")),
        sa.UniqueConstraint("key", name=op.f("uq_blobs_key")),
    )
    op.create_index(
        op.f("ix_blobs_project_id_sha256"), "blobs", ["project_id", "sha256"], unique=False
    )
    op.create_index(op.f("ix_blobs_wanted_at"), "blobs", ["wanted_at"], unique=False)
    uses = op.create_table(
        "blob_uses",
        sa.Column("blob_id", sa.String(length=40), nullable=False),
        sa.Column("owner_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["blob_id"], ["blobs.id"], name=op.f("fk_blob_uses_blob_id")),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_blob_uses_project_id")
        ),
        sa.PrimaryKeyConstraint("blob_id", "owner_id", name=op.f("pk_blob_uses")),
    )
    op.create_index(op.f("ix_blob_uses_owner_id"), "blob_uses", ["owner_id"], unique=False)
    _name_the_blobs_of_before(blobs, uses)


def _name_the_blobs_of_before(blobs: sa.Table, uses: sa.Table) -> None:
    """Files of models and datasets from before there were blobs: one each, so that they count and
    go like others. (Those that a process of the version before still adds are named when they
    are deleted.)"""
    connection = op.get_bind()
    for name in ("models", "datasets"):
        owners = sa.table(
            name,
            sa.column("id", sa.String),
            sa.column("project_id", sa.String),
            sa.column("files", JSON),
            sa.column("created_at", TIME),
        )
        for owner in connection.execute(sa.select(owners)).all():
            for file in owner.files:
                id = "blb_" + secrets.token_urlsafe(16)
                blob = {
                    "id": id,
                    "project_id": owner.project_id,
                    "sha256": file["sha256"],
                    "size_bytes": file["size_bytes"],
                    "key": file["key"],
                    "wanted_at": owner.created_at,
                    "stored_at": owner.created_at,
                    "doomed": False,
                }
                use = {"blob_id": id, "owner_id": owner.id, "project_id": owner.project_id}
                connection.execute(blobs.insert().values(blob))
                connection.execute(uses.insert().values(use))


def downgrade() -> None:
    op.drop_table("blob_uses")
    op.drop_table("blobs")
    op.drop_table("uploads")
    op.drop_index(op.f("ix_artifacts_project_id"), "artifacts")
    for table in ("models", "datasets", "artifacts"):
        op.drop_column(table, "deleted_at")
    for name in ("bytes", "uploads", "running_jobs", "queued_jobs"):
        op.drop_column("projects", f"quota_{name}")
