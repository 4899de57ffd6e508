"""Projects, their API keys and their audit log, each call inside a transaction that the caller
opened.

Only the SHA-256 of a key is stored. A key is 32 random bytes, so a plain hash suffices:
there is nothing to guess, and looking a hash up gives a timing attacker nothing.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from jobs.db import now
from jobs.errors import NotFound
from jobs.idempotency import Hold, note_change
from jobs.paging import (
    get_of_project,
    newest_first,
    page_of_project,
    place_of,
    read_cursor,
)
from jobs.records import ApiKey, AuditEntry, Project, new_id
from jobs.redaction import redact_all
from jobs.roles import Role
from jobs.store import json_safe

USE_RECORDED_EVERY = timedelta(minutes=1)


@dataclass(frozen=True)
class Actor:
    """Who acts, for the audit log: a key in a request, or the service's host (no key). `hold`:
    of a request that came with an Idempotency-Key."""

    project_id: str
    key_id: str | None = None
    request_id: str | None = None
    client: str | None = None
    hold: Hold | None = None


def new_key() -> str:
    """A fresh API key: "wwk_" and 43 URL-safe characters."""
    return "wwk_" + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


# --- projects ---------------------------------------------------------------------------


def add_project(session: Session, *, name: str) -> Project:
    project = Project(id=new_id("project"), name=name, created_at=now(session))
    session.add(project)
    session.flush()
    return project


def get_project(session: Session, id: str) -> Project:
    project = session.get(Project, id)
    if project is None:
        raise NotFound("project", id)
    return project


def list_projects(session: Session, *, after: str | None = None, limit: int = 50) -> list[Project]:
    """All of them, newest first; `after` as everywhere. For the operator alone."""
    last = None if after is None else read_cursor(after)
    if after is not None and last is None:
        last = place_of(get_project(session, after))
    return newest_first(session, Project, last, limit)


# --- API keys ---------------------------------------------------------------------------


def add_api_key(
    session: Session,
    *,
    project_id: str,
    name: str,
    hash: str,
    role: Role,
    expires_at: datetime | None = None,
) -> ApiKey:
    """`hash`: of the key, by `hash_key`."""
    key = ApiKey(
        id=new_id("api_key"),
        project_id=project_id,
        name=name,
        hash=hash,
        role=role,
        created_at=now(session),
        expires_at=expires_at,
        last_used_at=None,
        revoked_at=None,
    )
    session.add(key)
    session.flush()
    return key


def find_api_key(session: Session, hash: str, *, at: datetime) -> ApiKey | None:
    """The key with this hash, unless it was revoked or has expired by the time `at`."""
    return session.scalar(select(ApiKey).where(ApiKey.hash == hash, *_holding(at)))


def key_holds(session: Session, id: str) -> bool:
    """Whether a key that was let in is still to be let in."""
    query = select(ApiKey.id).where(ApiKey.id == id, *_holding(now(session)))
    return session.scalar(query) is not None


def holding_keys(session: Session, ids: Iterable[str]) -> set[str]:
    """Those of some hundred keys that were let in which are still to be let in."""
    query = select(ApiKey.id).where(ApiKey.id.in_(ids), *_holding(now(session)))
    return set(session.scalars(query))


def _holding(at: datetime) -> tuple[Any, ...]:
    return (
        ApiKey.revoked_at.is_(None),
        or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > at),
    )


def has_api_keys(session: Session) -> bool:
    return session.scalar(select(ApiKey.id).limit(1)) is not None


def get_api_key(session: Session, id: str, *, project_id: str) -> ApiKey:
    return get_of_project(session, ApiKey, "API key", id, project_id)


def list_api_keys(
    session: Session, *, project_id: str, after: str | None = None, limit: int = 50
) -> list[ApiKey]:
    """Newest first, the revoked and expired ones too; `after` as everywhere."""
    return page_of_project(session, ApiKey, "API key", project_id, after, limit)


def revoke_api_key(session: Session, id: str, *, project_id: str) -> tuple[ApiKey, bool]:
    """From this commit on the key opens nothing. Also whether it was not revoked before:
    asking again changes nothing."""
    key = get_api_key(session, id, project_id=project_id)
    revokes = (
        update(ApiKey)
        .where(ApiKey.id == key.id, ApiKey.revoked_at.is_(None))
        .values(revoked_at=now(session))
        .returning(ApiKey.id)
    )
    changed = session.scalar(revokes) is not None
    session.refresh(key)
    return key, changed


def use_is_unrecorded(key: ApiKey, *, at: datetime) -> bool:
    """Whether a use at this time is to be written: once a minute, and not for each request."""
    return key.last_used_at is None or at - key.last_used_at >= USE_RECORDED_EVERY


def record_use(session: Session, id: str) -> None:
    session.execute(update(ApiKey).where(ApiKey.id == id).values(last_used_at=now(session)))


# --- the audit log ----------------------------------------------------------------------


def record_action(
    session: Session, actor: Actor, action: str, target: str, **details: Any
) -> AuditEntry:
    """One line of the audit log, in the transaction that does what it tells: both are there or
    neither. `action`: "job.created" and the like; `target`: the id of what was acted on. A request
    that came with an Idempotency-Key has then done what it does, whatever becomes of it."""
    if actor.hold is not None:
        note_change(session, actor.hold, action, target)
    entry = AuditEntry(
        id=new_id("audit_entry"),
        project_id=actor.project_id,
        key_id=actor.key_id,
        action=action,
        target=target,
        details=redact_all(json_safe(details)),
        request_id=redact_all(actor.request_id),  # a client may have chosen it
        client=actor.client,
        created_at=now(session),
    )
    session.add(entry)
    session.flush()
    return entry


def list_actions(
    session: Session,
    *,
    project_id: str,
    after: str | None = None,
    limit: int = 50,
    key_id: str | None = None,
    target: str | None = None,
) -> list[AuditEntry]:
    """Newest first; `after` as everywhere, the others leave in only what they name."""
    conditions = []
    if key_id is not None:
        conditions.append(AuditEntry.key_id == key_id)
    if target is not None:
        conditions.append(AuditEntry.target == target)
    return page_of_project(
        session, AuditEntry, "audit entry", project_id, after, limit, *conditions
    )
