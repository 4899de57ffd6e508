"""Blobs: the bytes of a project's models and datasets, stored once however often they are used.

An upload first says which bytes it `want`s, stores those that are not there yet, and in the
transaction that makes its record begins to `use` them. What nothing uses is deleted by the
reconciler after a while: `doom`, then the object, then `forget`. Whoever uses or dooms holds the
project's row, so a blob that is going is never begun to be used; and each blob has a key of its
own, so the bytes of one that is going are never those of one that is coming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, exists, select, update
from sqlalchemy.orm import Session

from jobs.db import now
from jobs.errors import StoreRefused
from jobs.records import Blob, BlobUse, Project, new_id


@dataclass(frozen=True)
class Wanted:
    """`is_stored`: whether the bytes are in the store already; else `key` is to be put there."""

    blob_id: str
    sha256: str
    key: str
    is_stored: bool


def hold_project(session: Session, project_id: str) -> Project:
    """The project's row, locked until the transaction ends; records may still be added to it."""
    return session.scalars(
        select(Project)
        .where(Project.id == project_id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    ).one()


def want(session: Session, project_id: str, files: Sequence[tuple[str, int]]) -> list[Wanted]:
    """For each (hex SHA-256, size in bytes) the blob that has it, or a new one to be stored."""
    at = now(session)
    wanted: list[Wanted] = []
    for sha256, size_bytes in files:
        same = next((each for each in wanted if each.sha256 == sha256), None)
        if same is not None:  # two files of one upload
            wanted.append(same)
            continue
        blob = _stored(session, project_id, sha256)
        if blob is None:
            id = new_id("blob")
            blob = Blob(
                id=id,
                project_id=project_id,
                sha256=sha256,
                size_bytes=size_bytes,
                key=f"blobs/{project_id}/{sha256}/{id}",
                wanted_at=at,
                stored_at=None,
                doomed=False,
            )
            session.add(blob)
            session.flush()
        blob.wanted_at = at
        wanted.append(Wanted(blob.id, sha256, blob.key, blob.stored_at is not None))
    return wanted


def use(
    session: Session, project_id: str, owner_id: str, wanted: Sequence[Wanted]
) -> dict[str, str]:
    """Makes them the owner's; the key of each SHA-256, which is another's where the same bytes
    were stored twice at once. StoreRefused where one went meanwhile."""
    hold_project(session, project_id)
    at = now(session)
    keys: dict[str, str] = {}
    for each in {each.blob_id: each for each in wanted}.values():
        blob = _stored(session, project_id, each.sha256)
        if blob is None:
            blob = session.get(Blob, each.blob_id, populate_existing=True)
            if blob is None or blob.doomed or each.is_stored:
                raise StoreRefused("Storing the upload took too long; send it again.")
        blob.stored_at = blob.stored_at or at
        blob.wanted_at = at
        session.add(BlobUse(blob_id=blob.id, owner_id=owner_id, project_id=project_id))
        keys[each.sha256] = blob.key
    session.flush()
    return keys


def unwant(session: Session, wanted: Sequence[Wanted]) -> list[str]:
    """Of an upload that came to nothing: forgets the blobs that it would have stored; their keys.
    Those that are used after all (its record was made, whatever was told) stay."""
    new = [each.blob_id for each in wanted if not each.is_stored]
    found = session.scalars(select(Blob).where(Blob.id.in_(new), ~_used()).with_for_update()).all()
    keys = [blob.key for blob in found]
    for blob in found:
        session.delete(blob)
    return keys


def give_up(
    session: Session, project_id: str, owner_id: str, files: Sequence[dict[str, Any]]
) -> None:
    """The owner needs its files no more; those that nobody else uses may go. Call it with the
    project's row held."""
    at = now(session)
    for file in files:
        known = session.scalar(select(Blob).where(Blob.key == file["key"]))
        if known is not None:
            known.wanted_at = at
        else:  # stored by a version that knew no blobs
            session.add(
                Blob(
                    id=new_id("blob"),
                    project_id=project_id,
                    sha256=file["sha256"],
                    size_bytes=file["size_bytes"],
                    key=file["key"],
                    wanted_at=at,
                    stored_at=at,
                    doomed=False,
                )
            )
    session.execute(delete(BlobUse).where(BlobUse.owner_id == owner_id))


def unused(session: Session, *, grace_seconds: float, limit: int = 100) -> list[Blob]:
    """Those that nothing has used for so long, or of which it is already said that they go."""
    before = now(session) - timedelta(seconds=grace_seconds)
    return list(
        session.scalars(
            select(Blob)
            .where(Blob.wanted_at <= before, ~_used())
            .order_by(Blob.wanted_at)
            .limit(limit)
        )
    )


def doom(session: Session, blob: Blob, *, grace_seconds: float) -> bool:
    """Whether it may go: from this commit on nobody begins to use it."""
    hold_project(session, blob.project_id)
    before = now(session) - timedelta(seconds=grace_seconds)
    changed = session.execute(
        update(Blob)
        .where(Blob.id == blob.id, Blob.wanted_at <= before, ~_used())
        .values(doomed=True)
        .returning(Blob.id)
        .execution_options(synchronize_session=False)
    )
    return changed.scalar() is not None


def forget(session: Session, blob_id: str) -> None:
    """Call it once the object is deleted."""
    session.execute(delete(Blob).where(Blob.id == blob_id))


def _used() -> Any:
    return exists().where(BlobUse.blob_id == Blob.id).correlate(Blob)


def _stored(session: Session, project_id: str, sha256: str) -> Blob | None:
    """The first one of these bytes that may be used."""
    return session.scalar(
        select(Blob)
        .where(
            Blob.project_id == project_id,
            Blob.sha256 == sha256,
            Blob.stored_at.is_not(None),
            Blob.doomed.is_(False),
        )
        .order_by(Blob.stored_at, Blob.id)
        .limit(1)
        .execution_options(populate_existing=True)
    )
