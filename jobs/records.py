"""The service's records. Every one carries its project's id.

Times are aware and in UTC, from the database's clock. Ids are opaque: a prefix
for the type and 128 random bits.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Enum,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from jobs.roles import Role
from jobs.states import DeliveryState, JobState, RunState

DEFAULT_PROJECT = "prj_default"
ID_PREFIXES = {
    "project": "prj_",
    "api_key": "key_",
    "model": "mdl_",
    "dataset": "dst_",
    "job": "job_",
    "run": "run_",
    "artifact": "art_",
    "audit_entry": "aud_",
    "webhook": "whk_",
    "webhook_delivery": "dlv_",
}


def new_id(kind: str) -> str:
    """A fresh id: "mdl_" and 22 URL-safe characters."""
    return ID_PREFIXES[kind] + secrets.token_urlsafe(16)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC, also in SQLite, which keeps no time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("times are stored aware, in UTC")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


JsonValue = JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
Id = String(40)


def _named(states: type[StrEnum]) -> Enum:
    """Kept as plain words: a new state needs no change of a type in the database."""
    return Enum(
        states,
        native_enum=False,
        length=20,
        values_callable=lambda members: [member.value for member in members],
    )


class Record(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {datetime: UtcDateTime, Any: JsonValue}


class Project(Record):
    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime]


class ApiKey(Record):
    """`hash` is the hex SHA-256 of the whole key; the key itself is kept nowhere.
    `last_used_at` is written at most once a minute: see access.find_api_key."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str] = mapped_column(String(200))
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    # Keys from before there were roles could do everything, and so can those that a process of
    # that version still makes.
    role: Mapped[Role] = mapped_column(_named(Role), server_default=Role.ADMIN.value)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class AuditEntry(Record):
    """Who did what, written with what was done and never changed. `key_id` is null for the
    service's host (its start, its command line); `target` is the id of a record, `details` a few
    words of what it came to."""

    __tablename__ = "audit_entries"
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key_id: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    action: Mapped[str] = mapped_column(String(40))
    target: Mapped[str] = mapped_column(Id)
    details: Mapped[Any]
    request_id: Mapped[str | None] = mapped_column(String(64))
    client: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime]


class Model(Record):
    """An inspected model.

    `files`: `[{"name", "key", "size_bytes", "sha256"}]`, the clean files that a run
    stages in. `uploads`: `[{"name", "size_bytes", "sha256"}]`, the files as they came.
    `info`: compression.plan.ModelInfo.
    """

    __tablename__ = "models"
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(200))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    uploads: Mapped[Any]
    files: Mapped[Any]
    info: Mapped[Any]
    warnings: Mapped[Any]
    created_at: Mapped[datetime]


class Dataset(Record):
    """An inspected dataset; `files` and `uploads` as in Model. `profile`: DatasetProfile."""

    __tablename__ = "datasets"
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(200))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    uploads: Mapped[Any]
    files: Mapped[Any]
    profile: Mapped[Any]
    warnings: Mapped[Any]
    created_at: Mapped[datetime]


class Job(Record):
    """What a user asked for.

    `fence` counts the runs ever opened; a write by a run with a lower number is stale.
    `attempts` counts those of them that were not handed back. `last_event` is the number
    of the newest event. `error`: `{"code", "message", "pointer", "rows",
    "last_lines"?}`. `report`: compression.report.CompressionReport. `checkpoints`: `[{"name",
    "key", "size_bytes", "sha256", "stage", "step", "stored_at"}]`, newest first, those that are
    still in the object store; a run stages in the newest good one.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index(None, "state", "created_at", "id"),
        Index(None, "project_id", "state", "created_at", "id"),
        Index(
            "ix_jobs_with_checkpoints",
            "id",
            postgresql_where=text("checkpoints IS NOT NULL"),
            sqlite_where=text("checkpoints IS NOT NULL"),
        ),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(200))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    spec: Mapped[Any]
    plan: Mapped[Any | None]
    state: Mapped[JobState] = mapped_column(_named(JobState))
    fence: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    lease_expires_at: Mapped[datetime | None]
    last_event: Mapped[int] = mapped_column(default=0)
    report: Mapped[Any | None]
    error: Mapped[Any | None]
    checkpoints: Mapped[Any | None]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Run(Record):
    """One attempt at a job. `swept_at`: when the objects it left behind were deleted."""

    __tablename__ = "runs"
    __table_args__ = (
        UniqueConstraint("job_id", "fence"),
        Index(None, "swept_at", "ended_at"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    fence: Mapped[int]
    worker: Mapped[str] = mapped_column(String(200))
    state: Mapped[RunState] = mapped_column(_named(RunState))
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    swept_at: Mapped[datetime | None]


class Event(Record):
    """One line of a job's history. `number` counts from 1 in each job, without gaps."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    fence: Mapped[int]
    kind: Mapped[str] = mapped_column(String(20))
    data: Mapped[Any]
    created_at: Mapped[datetime]


class Artifact(Record):
    """A stored file that a user downloads. `path`: "<subnetwork>/<format>/<file>" or
    "<subnetwork>/bundle.tar.gz"; `key` is where the object store has it."""

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("job_id", "fence", "path"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    fence: Mapped[int]
    path: Mapped[str] = mapped_column(String(500))
    key: Mapped[str] = mapped_column(Text, unique=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    media_type: Mapped[str] = mapped_column(String(100))
    created_at: Mapped[datetime]


class Webhook(Record):
    """Where a project wants to be called. `events`: which, as jobs.webhooks.WebhookEvent names
    them; `secret`: what its messages are signed with. `failing_since`: the first failure that no
    success has followed."""

    __tablename__ = "webhooks"
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    url: Mapped[str] = mapped_column(Text)
    events: Mapped[Any]
    secret: Mapped[str] = mapped_column(String(100))
    created_at: Mapped[datetime]
    failing_since: Mapped[datetime | None]
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None] = mapped_column(String(500))


class WebhookDelivery(Record):
    """A message to a webhook; its id is the message's. `tries` counts since it was last asked for,
    `claimed_until` is when another worker may take it. `attempts`: `[{"at", "status", "error",
    "milliseconds"}]`, oldest first. It outlives its job, so that it names no record of it."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index(None, "webhook_id", "created_at", "id"),
        Index(None, "state", "next_attempt_at"),
        Index(None, "ended_at"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id"))
    event: Mapped[str] = mapped_column(String(40))
    job_id: Mapped[str] = mapped_column(Id)
    event_number: Mapped[int]
    state: Mapped[DeliveryState] = mapped_column(_named(DeliveryState))
    tries: Mapped[int]
    next_attempt_at: Mapped[datetime | None]
    claimed_until: Mapped[datetime | None]
    attempts: Mapped[Any]
    created_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
