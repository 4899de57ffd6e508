"""Records of one project, by id or as a page: what is another project's is not found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from sqlalchemy import literal, select, tuple_
from sqlalchemy.orm import Session, defer

from jobs.errors import NotFound
from jobs.records import (
    ApiKey,
    AuditEntry,
    Dataset,
    Job,
    Model,
    Profile,
    Project,
    Upload,
    Webhook,
    WebhookDelivery,
)

P = TypeVar("P", Model, Dataset, Profile, Job, ApiKey, AuditEntry, Upload, Webhook, WebhookDelivery)
R = TypeVar(
    "R",
    Model,
    Dataset,
    Profile,
    Job,
    ApiKey,
    AuditEntry,
    Upload,
    Webhook,
    WebhookDelivery,
    Project,
)


def get_of_project(session: Session, record: type[P], kind: str, id: str, project_id: str) -> P:
    """NotFound, with `kind` as its word, for an id that does not exist in this project."""
    found = session.scalar(select(record).where(record.id == id, record.project_id == project_id))
    if found is None:
        raise NotFound(kind, id)
    return found


def page_of_project(
    session: Session,
    record: type[P],
    kind: str,
    project_id: str,
    after: str | None,
    limit: int,
    *conditions: Any,
    without: Sequence[Any] = (),
) -> list[P]:
    """Newest first; `after` is the id of the last one seen. NotFound if it does not exist.
    `without`: columns that are not read, nor may be afterwards."""
    last = None if after is None else get_of_project(session, record, kind, after, project_id)
    mine = record.project_id == project_id
    return newest_first(session, record, last, limit, mine, *conditions, without=without)


def newest_first(
    session: Session,
    record: type[R],
    last: R | None,
    limit: int,
    *conditions: Any,
    without: Sequence[Any] = (),
) -> list[R]:
    """Up to `limit` records, from the one after `last` on."""
    unread = [defer(column, raiseload=True) for column in without]
    query = select(record).where(*conditions).options(*unread)
    if last is not None:
        # As one value: an index is entered there, where an OR would have it read up to there.
        cursor = tuple_(
            literal(last.created_at, record.created_at.type), literal(last.id, record.id.type)
        )
        query = query.where(tuple_(record.created_at, record.id) < cursor)
    query = query.order_by(record.created_at.desc(), record.id.desc()).limit(limit)
    return list(session.scalars(query))
