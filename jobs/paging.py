"""Records of one project, by id or as a page: what is another project's is not found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
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


# When the last record seen was created, and its id. As a cursor: `<id>~<microseconds since 1970>`.
Place = tuple[datetime, str]
_CURSOR = re.compile(r"([A-Za-z0-9_-]{1,40})~([0-9]{1,17})", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


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
    """Newest first; `after` is the last one seen: its cursor, or its id. NotFound if it does not
    exist, or for what is neither. `without`: columns that are not read, nor may be afterwards."""
    last = None if after is None else read_cursor(after)
    if after is not None and last is None:
        last = place_of(get_of_project(session, record, kind, after, project_id))
    mine = record.project_id == project_id
    return newest_first(session, record, last, limit, mine, *conditions, without=without)


def cursor_of(record: R) -> str:
    """Where the page after this record begins, also once the record was deleted."""
    return f"{record.id}~{(record.created_at - _EPOCH) // _MICROSECOND}"


def read_cursor(cursor: str) -> Place | None:
    """None for what is no cursor: it may be an id."""
    match = _CURSOR.fullmatch(cursor)
    return None if match is None else (_EPOCH + int(match[2]) * _MICROSECOND, match[1])


def place_of(record: R) -> Place:
    return record.created_at, record.id


def newest_first(
    session: Session,
    record: type[R],
    last: Place | None,
    limit: int,
    *conditions: Any,
    without: Sequence[Any] = (),
) -> list[R]:
    """Up to `limit` records, from the one after `last` on."""
    unread = [defer(column, raiseload=True) for column in without]
    query = select(record).where(*conditions).options(*unread)
    if last is not None:
        # As one value: an index is entered there, where an OR would have it read up to there.
        created_at, id = last
        cursor = tuple_(literal(created_at, record.created_at.type), literal(id, record.id.type))
        query = query.where(tuple_(record.created_at, record.id) < cursor)
    query = query.order_by(record.created_at.desc(), record.id.desc()).limit(limit)
    return list(session.scalars(query))
