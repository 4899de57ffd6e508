"""The service's records. Every one carries its project's id, except for workers, who serve all.

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
    LargeBinary,
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

from jobs.devices import Device
from jobs.roles import Role
from jobs.states import DeliveryState, JobState, RunState

DEFAULT_PROJECT = "prj_default"
ID_PREFIXES = {
    "project": "prj_",
    "api_key": "key_",
    "model": "mdl_",
    "dataset": "dst_",
    "profile": "prf_",
    "job": "job_",
    "run": "run_",
    "artifact": "art_",
    "audit_entry": "aud_",
    "upload": "upl_",
    "blob": "blb_",
    "worker": "wrk_",
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


class SupportedRevision(Record):
    """A schema revision whose processes work with the schema as it is now: see jobs.migrate."""

    __tablename__ = "supported_revisions"

    revision: Mapped[str] = mapped_column(String(32), primary_key=True)


class Project(Record):
    """A quota that is null bounds nothing: see jobs.quotas."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime]
    quota_bytes: Mapped[int | None] = mapped_column(BigInteger)
    quota_uploads: Mapped[int | None]
    quota_running_jobs: Mapped[int | None]
    quota_queued_jobs: Mapped[int | None]


class ApiKey(Record):
    """`hash` is the hex SHA-256 of the whole key; the key itself is kept nowhere.
    `last_used_at` is written at most once a minute: see access.use_is_unrecorded."""

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


class Upload(Record):
    """A resumable upload (jobs.resumable) until it has become a model or dataset, and for a while
    after that. `metadata_sent`: Upload-Metadata as it came. What it came to, at `finished_at`:
    `record_id`, or `error` ({"status", "code", ...}) where inspection refused it."""

    __tablename__ = "uploads"
    __table_args__ = (Index(None, "project_id", "finished_at"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key_id: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    kind: Mapped[str] = mapped_column(String(20))
    filename: Mapped[str] = mapped_column(String(200))
    name: Mapped[str | None] = mapped_column(String(200))
    metadata_sent: Mapped[str] = mapped_column(Text)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime] = mapped_column(index=True)
    finished_at: Mapped[datetime | None]
    record_id: Mapped[str | None] = mapped_column(Id)
    error: Mapped[Any | None]


class Blob(Record):
    """Bytes in the object store that a project's models and datasets share (jobs.blobs). Those
    that nothing uses go some time after `wanted_at`; `doomed`: they are going, so nobody may
    begin to use them. `stored_at` is null while they are on their way into the store."""

    __tablename__ = "blobs"
    __table_args__ = (Index(None, "project_id", "sha256"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    sha256: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    key: Mapped[str] = mapped_column(Text, unique=True)
    wanted_at: Mapped[datetime] = mapped_column(index=True)
    stored_at: Mapped[datetime | None]
    doomed: Mapped[bool] = mapped_column(default=False)


class BlobUse(Record):
    """`owner_id`: of the model or dataset that needs the blob."""

    __tablename__ = "blob_uses"

    blob_id: Mapped[str] = mapped_column(ForeignKey("blobs.id"), primary_key=True)
    owner_id: Mapped[str] = mapped_column(Id, primary_key=True, index=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))


class IdempotencyKey(Record):
    """A request that may be sent again: see jobs.idempotency. `hash`: of the key that the client
    chose; `request` and `body_sha256`: of what it asked. A request is in progress until
    `held_until`, and done once there is a `status`, or an `action` and nobody who holds it."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index(None, "expires_at"),)

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    request: Mapped[str] = mapped_column(String(64))
    token: Mapped[str] = mapped_column(String(40))
    held_until: Mapped[datetime | None]
    body_sha256: Mapped[str | None] = mapped_column(String(64))
    body_bytes: Mapped[int | None] = mapped_column(BigInteger)
    action: Mapped[str | None] = mapped_column(String(40))
    target: Mapped[str | None] = mapped_column(Id)
    status: Mapped[int | None]
    headers: Mapped[Any | None]
    content: Mapped[bytes | None] = mapped_column(LargeBinary)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]


class Model(Record):
    """An inspected model. `deleted_at`: since when its files may be gone; the record stays for
    the jobs that name it.

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
    deleted_at: Mapped[datetime | None]


class Dataset(Record):
    """An inspected dataset; `files`, `uploads` and `deleted_at` as in Model. `profile`:
    DatasetProfile."""

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
    deleted_at: Mapped[datetime | None]


class Profile(Record):
    """A device's latency profile. `content`: compression.device_profile.DeviceProfile, `sha256`
    of it; `summary`: the same without its tables and networks, and with its error."""

    __tablename__ = "profiles"
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(200))
    sha256: Mapped[str] = mapped_column(String(64))
    summary: Mapped[Any]
    content: Mapped[Any] = mapped_column(deferred=True)  # up to a mebibyte, which lists do not show
    created_at: Mapped[datetime]


class Job(Record):
    """What a user asked for.

    `fence` counts the runs ever opened; a write by a run with a lower number is stale.
    `attempts` counts those of them that were not handed back. `last_event` is the number
    of the newest event. `error`: `{"code", "message", "pointer", "rows",
    "last_lines"?}`. `report`: compression.report.CompressionReport. `checkpoints`: `[{"name",
    "key", "size_bytes", "sha256", "stage", "step", "stored_at"}]`, newest first, those that are
    still in the object store; a run stages in the newest good one.

    `precedence` is the priority with its sign changed, so that the queue's order (precedence, then
    age) is an ascending index. `device`: whose queue it waits in (jobs.devices), null where a
    process of a version that had one queue stored it: see store.route_job. `predicted_seconds`
    is the plan's. `time_limit_seconds` counts over the runs since `retried_at`.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index(None, "state", "created_at", "id"),
        Index(None, "state", "device", "precedence", "created_at", "id"),
        Index(None, "state", "device", "finished_at"),
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
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), index=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"), index=True)
    # What the spec's constraints.latency_on names; null too once that was deleted.
    profile_id: Mapped[str | None] = mapped_column(ForeignKey("profiles.id"), index=True)
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
    precedence: Mapped[int] = mapped_column(server_default="0", default=0)
    device: Mapped[Device | None] = mapped_column(_named(Device))
    predicted_seconds: Mapped[float | None]
    time_limit_seconds: Mapped[float | None]
    retried_at: Mapped[datetime | None]


class DeletedJob(Record):
    """A job whose records are gone, until its objects are too: see jobs.deletion."""

    __tablename__ = "deleted_jobs"
    __table_args__ = (Index(None, "deleted_at"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    deleted_at: Mapped[datetime]


class Worker(Record):
    """A process that takes jobs, and what it announced: `slots` jobs on its CPU, one a GPU. It is
    lost once its lease has expired; while `drain_requested_at` is set it is given no job."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    slots: Mapped[int]
    gpus: Mapped[int]
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    lease_expires_at: Mapped[datetime]
    drain_requested_at: Mapped[datetime | None]


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
    "<subnetwork>/bundle.tar.gz"; `key` is where the object store has it, until `deleted_at`."""

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("job_id", "fence", "path"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    fence: Mapped[int]
    path: Mapped[str] = mapped_column(String(500))
    key: Mapped[str] = mapped_column(Text, unique=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    media_type: Mapped[str] = mapped_column(String(100))
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]


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
