"""Idempotency keys: a request that is sent again gets the first one's answer, and what it does is
done once. Each call is inside a transaction that the caller opened.

A key is claimed before its request is carried out, and is held while that goes on; like a run, a
request that lost its hold to another one is refused in the transaction in which it would have
changed something (`note_change`). That transaction also writes what was changed, so a process
that dies before it could keep the answer leaves a request that is known to be done.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from jobs.db import now
from jobs.errors import Conflict, KeyReused
from jobs.records import IdempotencyKey


class Body(Protocol):
    """What has come of a request's body so far."""

    @property
    def size_bytes(self) -> int: ...

    def sha256(self) -> str: ...


@dataclass(frozen=True)
class Hold:
    """The right of one request to be carried out under its key."""

    project_id: str
    hash: str
    token: str
    body: Body


@dataclass(frozen=True)
class Done:
    """A request that was carried out. `status` is None where its answer was not kept; `action`
    and `target` are what it changed, as in the audit log, if it changed anything."""

    body_sha256: str
    body_bytes: int
    action: str | None
    target: str | None
    status: int | None
    headers: tuple[tuple[str, str], ...]
    content: bytes


def hash_of(key: str) -> str:
    """What is stored of a key: a client may have put anything into it."""
    return hashlib.sha256(key.encode()).hexdigest()


def take_hold(
    session: Session,
    *,
    project_id: str,
    key: str,
    request: str,
    body: Body,
    hold_seconds: float,
    kept_seconds: float,
) -> Hold | Done:
    """The hold of a key that is new, or whose request came to nothing; else what came of it.

    `request` is a digest of what is asked, without the body. KeyReused where it is another one;
    Conflict ("request-in-progress") while another request holds the key. An IntegrityError, also
    of the commit, means that another was quicker by a moment: it is in progress.
    """
    hash, token, at = hash_of(key), secrets.token_urlsafe(16), now(session)
    found = session.scalar(
        select(IdempotencyKey)
        .where(IdempotencyKey.project_id == project_id, IdempotencyKey.hash == hash)
        .with_for_update()
    )
    if found is not None and not (found.expires_at <= at and _is_free(found, at)):
        if found.request != request:
            raise KeyReused("This key was used for another request: another path, query or header.")
        if not _is_free(found, at):
            raise Conflict(
                "The first request with this key is still being carried out.",
                code="request-in-progress",
            )
        if found.status is not None or found.action is not None:
            return _done(found)
    if found is not None:  # expired, or its process died before it had done anything
        session.delete(found)
        session.flush()
    session.add(
        IdempotencyKey(
            project_id=project_id,
            hash=hash,
            request=request,
            token=token,
            held_until=at + timedelta(seconds=hold_seconds),
            created_at=at,
            expires_at=at + timedelta(seconds=kept_seconds),
        )
    )
    session.flush()
    return Hold(project_id, hash, token, body)


def _is_free(record: IdempotencyKey, at: Any) -> bool:
    return record.held_until is None or record.held_until <= at


def _done(record: IdempotencyKey) -> Done:
    return Done(
        body_sha256=record.body_sha256 or "",
        body_bytes=record.body_bytes or 0,
        action=record.action,
        target=record.target,
        status=record.status,
        headers=tuple((name, value) for name, value in record.headers or ()),
        content=record.content or b"",
    )


def extend(session: Session, hold: Hold, *, hold_seconds: float) -> None:
    _update(session, hold, held_until=now(session) + timedelta(seconds=hold_seconds))


def note_change(session: Session, hold: Hold, action: str, target: str) -> None:
    """Call it in the transaction that changes something, once the whole body was read. Conflict
    where the hold was lost: then nothing must be changed."""
    changed = _update(
        session,
        hold,
        action=func.coalesce(IdempotencyKey.action, action),
        target=func.coalesce(IdempotencyKey.target, target),
        body_sha256=hold.body.sha256(),
        body_bytes=hold.body.size_bytes,
    )
    if not changed:
        raise Conflict(
            "This request stood still for so long that another one with its key was let in.",
            code="request-in-progress",
        )


def keep_answer(
    session: Session,
    hold: Hold,
    *,
    status: int,
    headers: Sequence[tuple[str, str]],
    content: bytes,
) -> None:
    """From now on the key gives this answer."""
    _update(
        session,
        hold,
        status=status,
        headers=[list(header) for header in headers],
        content=content,
        body_sha256=hold.body.sha256(),
        body_bytes=hold.body.size_bytes,
        held_until=None,
    )


def let_go(session: Session, hold: Hold) -> None:
    """Of a request whose answer is not kept: where it changed nothing the key is free again."""
    session.execute(delete(IdempotencyKey).where(*_held_by(hold), IdempotencyKey.action.is_(None)))
    _update(session, hold, held_until=None)


def delete_expired(session: Session, *, limit: int = 1000) -> int:
    """How many keys were forgotten: those that are past their time and that nobody holds."""
    at = now(session)
    expired = session.execute(
        select(IdempotencyKey.project_id, IdempotencyKey.hash)
        .where(
            IdempotencyKey.expires_at <= at,
            or_(IdempotencyKey.held_until.is_(None), IdempotencyKey.held_until <= at),
        )
        .order_by(IdempotencyKey.expires_at)
        .limit(limit)
    ).all()
    for project_id, hash in expired:
        session.execute(
            delete(IdempotencyKey).where(
                IdempotencyKey.project_id == project_id,
                IdempotencyKey.hash == hash,
                IdempotencyKey.expires_at <= at,  # it may have been taken anew meanwhile
            )
        )
    return len(expired)


def _held_by(hold: Hold) -> tuple[Any, ...]:
    return (
        IdempotencyKey.project_id == hold.project_id,
        IdempotencyKey.hash == hold.hash,
        IdempotencyKey.token == hold.token,
        IdempotencyKey.status.is_(None),
    )


def _update(session: Session, hold: Hold, **values: Any) -> bool:
    changed = session.execute(
        update(IdempotencyKey)
        .where(*_held_by(hold))
        .values(**values)
        .returning(IdempotencyKey.hash)
        .execution_options(synchronize_session=False)
    ).scalar()
    return changed is not None
