"""Quotas of projects: how much each may keep and have running. One that is not set bounds nothing.

`bytes`: files of models and datasets (the same bytes once), artifacts, and what resumable uploads
have announced; not checkpoints, which come and go with their job. `uploads`: models, datasets and
resumable uploads under way. Both are held against new uploads and jobs; what a running job still
stores is never refused. Of more jobs than `running_jobs` the others wait in the queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, func, or_, select
from sqlalchemy.orm import Session

from jobs.blobs import hold_project
from jobs.errors import QuotaExceeded
from jobs.records import Artifact, Blob, BlobUse, Dataset, Job, Model, Project, Upload
from jobs.states import JobState

MAX_BYTES = 2**63 - 1
MAX_COUNT = 2**31 - 1


@dataclass(frozen=True)
class Quotas:
    """None: no limit."""

    bytes: int | None = None
    uploads: int | None = None
    running_jobs: int | None = None
    queued_jobs: int | None = None

    @classmethod
    def of(cls, project: Project) -> Quotas:
        return cls(
            bytes=project.quota_bytes,
            uploads=project.quota_uploads,
            running_jobs=project.quota_running_jobs,
            queued_jobs=project.quota_queued_jobs,
        )


@dataclass(frozen=True)
class Usage:
    bytes: int
    uploads: int
    running_jobs: int
    queued_jobs: int


def set_quotas(project: Project, changes: Mapping[str, int | None]) -> None:
    """Changes those that are named; what is there already stays, even above a new quota."""
    for name, limit in changes.items():
        setattr(project, f"quota_{name}", limit)


def usage(session: Session, project_id: str) -> Usage:
    return Usage(
        bytes=_bytes(session, project_id),
        uploads=_uploads(session, project_id),
        running_jobs=_jobs(session, project_id, JobState.RUNNING),
        queued_jobs=_jobs(session, project_id, JobState.QUEUED),
    )


def check_upload(
    session: Session, project_id: str, *, more_bytes: int = 0, more_uploads: int = 0
) -> None:
    """QuotaExceeded if the project has more than it may, with what is to come. In a transaction
    that writes, call it once that is flushed and with the project's row held."""
    quotas = Quotas.of(session.get_one(Project, project_id))
    if quotas.bytes is not None:
        used = _bytes(session, project_id) + more_bytes
        if used > quotas.bytes:
            raise QuotaExceeded("bytes", limit=quotas.bytes, used=used)
    if quotas.uploads is not None:
        used = _uploads(session, project_id) + more_uploads
        if used > quotas.uploads:
            raise QuotaExceeded("uploads", limit=quotas.uploads, used=used)


def check_job(session: Session, project_id: str) -> None:
    """QuotaExceeded if the project may not queue one more job."""
    quotas = Quotas.of(session.get_one(Project, project_id))
    if quotas.bytes is None and quotas.queued_jobs is None:
        return
    hold_project(session, project_id)
    if quotas.bytes is not None and (used := _bytes(session, project_id)) >= quotas.bytes:
        raise QuotaExceeded("bytes", limit=quotas.bytes, used=used)
    if quotas.queued_jobs is not None:
        used = _jobs(session, project_id, JobState.QUEUED) + 1
        if used > quotas.queued_jobs:
            raise QuotaExceeded("queued_jobs", limit=quotas.queued_jobs, used=used)


def has_room_to_run() -> ColumnElement[bool]:
    """Of jobs: their project has fewer running ones than it may. In a claim, call
    `hold_for_claim` before."""
    other = Job.__table__.alias()
    running = (
        select(func.count())
        .select_from(other)
        .where(other.c.project_id == Project.id, other.c.state == JobState.RUNNING)
        .correlate(Project)
        .scalar_subquery()
    )
    limit = Project.quota_running_jobs
    return Job.project_id.in_(select(Project.id).where(or_(limit.is_(None), running < limit)))


def hold_for_claim(session: Session, job_id: str) -> None:
    """Claims of a project's jobs, where those that run are bounded, are made one by one."""
    session.execute(
        select(Project.id)
        .join(Job, Job.project_id == Project.id)
        .where(Job.id == job_id, Project.quota_running_jobs.is_not(None))
        .with_for_update(of=Project, key_share=True)
    )


def _bytes(session: Session, project_id: str) -> int:
    used = select(BlobUse.blob_id).where(BlobUse.project_id == project_id)
    sums: tuple[Select[Any], ...] = (
        select(func.sum(Blob.size_bytes)).where(Blob.project_id == project_id, Blob.id.in_(used)),
        select(func.sum(Artifact.size_bytes)).where(
            Artifact.project_id == project_id, Artifact.deleted_at.is_(None)
        ),
        select(func.sum(Upload.size_bytes)).where(
            Upload.project_id == project_id, Upload.finished_at.is_(None)
        ),
    )
    return sum(int(session.scalar(each) or 0) for each in sums)


def _uploads(session: Session, project_id: str) -> int:
    counts: tuple[Select[Any], ...] = (
        *(
            select(func.count())
            .select_from(record)
            .where(record.project_id == project_id, record.deleted_at.is_(None))
            for record in (Model, Dataset)
        ),
        select(func.count())
        .select_from(Upload)
        .where(Upload.project_id == project_id, Upload.finished_at.is_(None)),
    )
    return sum(int(session.scalar(each) or 0) for each in counts)


def _jobs(session: Session, project_id: str, state: JobState) -> int:
    found = select(func.count()).where(Job.project_id == project_id, Job.state == state)
    return int(session.scalar(found) or 0)
