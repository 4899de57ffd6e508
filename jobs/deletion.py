"""Deleting models, datasets and artifacts, by hand and at the end of their retention; profiles and
jobs, by hand.

A record stays, marked, for the jobs and the audit log that name it; its objects go once nothing
uses them (jobs.blobs), after a grace period. A profile has none, and goes itself. What a queued or
running job needs is refused. Nothing needs a job that has ended: its records go, and after the same
grace period all that its runs have left in the store, of which no other job has anything.

What the retention period would delete, and deleting it now:

    python -m jobs.deletion --days 90
    python -m jobs.deletion --days 90 --delete
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import and_, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session

from jobs import access, blobs, store
from jobs.access import Actor
from jobs.db import Database, now
from jobs.errors import Conflict, JobsError, NotFound
from jobs.migrate import upgrade
from jobs.nudges import note_event
from jobs.records import Artifact, Dataset, Event, Job, Model, Profile, Run
from jobs.settings import get_settings
from jobs.states import JobState

P = TypeVar("P", Model, Dataset, Artifact)
_ACTIVE = (JobState.QUEUED, JobState.RUNNING)
BATCH = 100


@dataclass(frozen=True)
class Expired:
    """What is past its retention. `since`: when it was last of use."""

    kind: str
    id: str
    project_id: str
    name: str
    size_bytes: int
    since: datetime


def delete_model(session: Session, actor: Actor, id: str) -> None:
    """Conflict ("in-use") while a queued or running job has it; NotFound, or Gone, if it is not
    there."""
    _delete_upload(session, actor, Model, "model", id, Job.model_id)


def delete_dataset(session: Session, actor: Actor, id: str) -> None:
    _delete_upload(session, actor, Dataset, "dataset", id, Job.dataset_id)


def delete_artifact(session: Session, actor: Actor, id: str) -> None:
    blobs.hold_project(session, actor.project_id)
    artifact = _held(session, Artifact, "artifact", id, actor.project_id)
    job = session.get_one(Job, artifact.job_id)
    if job.state in _ACTIVE:
        raise Conflict(f"The artifact belongs to {job.id}, which is {job.state}.", code="in-use")
    artifact.deleted_at = now(session)
    file = {
        "key": artifact.key,
        "size_bytes": artifact.size_bytes,
        "sha256": artifact.sha256,
    }
    blobs.give_up(session, actor.project_id, artifact.id, [file])
    access.record_action(session, actor, "artifact.deleted", id, path=artifact.path)


def delete_profile(session: Session, actor: Actor, id: str) -> None:
    """Conflict ("in-use") while a queued or running job has it; NotFound if it is not there. Jobs
    that ended have what was predicted with it in their reports, and its id in their specs."""
    profile = session.scalar(
        select(Profile)
        .where(Profile.id == id, Profile.project_id == actor.project_id)
        .with_for_update()
    )
    if profile is None:
        raise NotFound("profile", id)
    _require_unused(session, "profile", id, Job.profile_id)
    session.execute(
        update(Job)
        .where(Job.profile_id == id, Job.state.not_in(_ACTIVE))
        .values(profile_id=None)
        .execution_options(synchronize_session=False)
    )
    session.delete(profile)
    access.record_action(session, actor, "profile.deleted", id, name=profile.name)


def delete_job(session: Session, actor: Actor, id: str) -> None:
    """With its events, runs, report and artifacts. Conflict ("job-not-finished") unless it has
    ended; NotFound if it is not there."""
    blobs.hold_project(session, actor.project_id)
    job = session.scalar(
        select(Job)
        .where(Job.id == id, Job.project_id == actor.project_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if job is None:
        raise NotFound("job", id)
    if not job.state.is_final:
        raise Conflict(
            f"The job is {job.state}: cancel it first, and delete it once it has ended.",
            code="job-not-finished",
        )
    for record in (Artifact, Event, Run):
        session.execute(
            delete(record).where(record.job_id == id).execution_options(synchronize_session=False)
        )
    session.delete(job)
    store.sweep_deleted_job(session, id, project_id=actor.project_id)
    note_event(session, id)  # whoever watches it learns that there is nothing to come
    access.record_action(session, actor, "job.deleted", id, name=job.name)


DELETE = {"model": delete_model, "dataset": delete_dataset, "artifact": delete_artifact}


def _delete_upload(
    session: Session, actor: Actor, record: type[Any], kind: str, id: str, column: Any
) -> None:
    blobs.hold_project(session, actor.project_id)
    found = _held(session, record, kind, id, actor.project_id)
    _require_unused(session, kind, id, column)
    found.deleted_at = now(session)
    blobs.give_up(session, actor.project_id, id, found.files)
    access.record_action(session, actor, f"{kind}.deleted", id, name=found.name)


def _require_unused(session: Session, kind: str, id: str, column: Any) -> None:
    """Conflict where a job that has not ended names the record, which the caller holds. A job that
    is being created holds it too (store.create_job): it is either seen here, or it sees that the
    record is deleted."""
    job = session.scalar(select(Job.id).where(column == id, Job.state.in_(_ACTIVE)).limit(1))
    if job is not None:
        raise Conflict(
            f"The {kind} is used by {job}, which has not ended; cancel it or wait.", code="in-use"
        )


def _held(session: Session, record: type[P], kind: str, id: str, project_id: str) -> P:
    found = session.scalar(
        select(record)
        .where(record.id == id, record.project_id == project_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if found is None:
        raise NotFound(kind, id)
    return store.present(found, kind)


# --- retention --------------------------------------------------------------------------


def past_retention(
    session: Session, *, days: float, project_id: str | None = None, limit: int = BATCH
) -> list[Expired]:
    """Artifacts of jobs that ended before that, and models and datasets that were uploaded before
    it and that no job had since; the oldest first of each, up to `limit` of each kind."""
    before = now(session) - timedelta(days=days)
    artifacts = (
        select(Artifact, Job.finished_at)
        .join(Job, Job.id == Artifact.job_id)
        .where(Artifact.deleted_at.is_(None), Job.finished_at < before)
        .order_by(Job.finished_at, Artifact.id)
    )
    if project_id is not None:
        artifacts = artifacts.where(Artifact.project_id == project_id)
    found = [
        Expired("artifact", each.id, each.project_id, each.path, each.size_bytes, ended)
        for each, ended in session.execute(artifacts.limit(limit))
        if ended is not None
    ]
    for kind, record, column in (
        ("model", Model, Job.model_id),
        ("dataset", Dataset, Job.dataset_id),
    ):
        found += _unused_since(session, kind, record, column, before, project_id, limit)
    return found


def _unused_since(
    session: Session,
    kind: str,
    record: type[Any],
    column: Any,
    before: datetime,
    project_id: str | None,
    limit: int,
) -> list[Expired]:
    needed = exists().where(
        column == record.id,
        or_(Job.state.in_(_ACTIVE), Job.created_at >= before, Job.finished_at >= before),
    )
    last_job = (
        select(func.max(func.coalesce(Job.finished_at, Job.created_at)))
        .where(column == record.id)
        .scalar_subquery()
    )
    query = (
        select(record, last_job)
        .where(and_(record.deleted_at.is_(None), record.created_at < before, ~needed))
        .order_by(record.created_at, record.id)
        .limit(limit)
    )
    if project_id is not None:
        query = query.where(record.project_id == project_id)
    return [
        Expired(
            kind,
            each.id,
            each.project_id,
            each.name,
            sum(file["size_bytes"] for file in each.files),
            last or each.created_at,
        )
        for each, last in session.execute(query)
    ]


def delete_past_retention(database: Database, *, days: float, limit: int = BATCH) -> list[Expired]:
    """Deletes up to `limit` of each kind; those it deleted. What came into use meanwhile stays."""
    with database.reading() as session:
        found = past_retention(session, days=days, limit=limit)
    deleted = []
    for each in found:
        try:
            with database.transaction() as session:
                DELETE[each.kind](session, Actor(each.project_id), each.id)
        except (Conflict, NotFound):
            continue
        deleted.append(each)
    return deleted


# --- by hand ----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 with a sentence on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.deletion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    settings = get_settings()
    parser.add_argument("--days", type=float, default=settings.retention_days or None)
    parser.add_argument("--project", help="list this project's alone (without --delete)")
    parser.add_argument("--delete", action="store_true", help="delete it; else it is only listed")
    given = parser.parse_args(arguments)
    if given.days is None:
        parser.error("no retention period is set (WIDTHWISE_RETENTION_DAYS): say --days")
    if not 0 <= given.days <= 36_500:
        parser.error("--days is a number from 0 to 36500")
    if given.delete and given.project:
        parser.error("--delete goes for all projects")
    database = Database(settings.database_url)
    try:
        upgrade(database)
        if given.delete:
            found = []
            while batch := delete_past_retention(database, days=given.days):
                found += batch
        else:
            with database.reading() as session:
                if given.project is not None:
                    access.get_project(session, given.project)
                found = past_retention(
                    session, days=given.days, project_id=given.project, limit=1_000_000
                )
    except JobsError as error:
        print(error.message, file=sys.stderr)
        return 1
    finally:
        database.close()
    for each in found:
        print(
            f"{each.kind}  {each.id}  {each.project_id}  {each.size_bytes} bytes  "
            f"{each.since:%Y-%m-%d %H:%M} UTC  {each.name}"
        )
    total = sum(each.size_bytes for each in found)
    word = "deleted" if given.delete else "would be deleted"
    print(f"{len(found)} {word}, {total} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
