"""Resumable uploads: their records, and where on this host their bytes gather until all are there.

The length of the gathering file is the offset, so a process that is killed loses nothing. The
file belongs to the host that receives it; the record says what it is to become.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs.db import Database, now
from jobs.errors import Gone, NotFound
from jobs.paging import get_of_project, page_of_project
from jobs.records import Upload, new_id

FOLDER = "uploads"
# Beside a gathering file, while bytes come whose checksum is still to be compared: the length
# that it had before them.
UNCHECKED_SUFFIX = ".unchecked"


def gathering_file(data_dir: Path, upload_id: str) -> Path:
    return data_dir / FOLDER / upload_id


def offset_of(file: Path) -> int:
    """Bytes that an upload has; 0 before its file is made. What was not yet held against its
    checksum when a process was killed does not count."""
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        return 0
    try:
        return min(size, int(unchecked_mark(file).read_text() or 0))
    except FileNotFoundError:
        return size


def unchecked_mark(file: Path) -> Path:
    return file.with_name(file.name + UNCHECKED_SUFFIX)


# --- records ----------------------------------------------------------------------------


def add_upload(
    session: Session,
    *,
    project_id: str,
    key_id: str | None,
    kind: str,
    filename: str,
    name: str | None,
    metadata_sent: str,
    size_bytes: int,
    lasts_seconds: float,
) -> Upload:
    at = now(session)
    upload = Upload(
        id=new_id("upload"),
        project_id=project_id,
        key_id=key_id,
        kind=kind,
        filename=filename,
        name=name,
        metadata_sent=metadata_sent,
        size_bytes=size_bytes,
        created_at=at,
        expires_at=at + timedelta(seconds=lasts_seconds),
        finished_at=None,
        record_id=None,
        error=None,
    )
    session.add(upload)
    session.flush()
    return upload


def get_upload(session: Session, id: str, *, project_id: str) -> Upload:
    """NotFound for another project's; Gone for one that has expired."""
    upload = get_of_project(session, Upload, "upload", id, project_id)
    if upload.expires_at <= now(session):
        raise Gone("upload", id, f"The upload {id!r} has expired; begin a new one.")
    return upload


def list_uploads(
    session: Session, *, project_id: str, after: str | None = None, limit: int = 50
) -> list[Upload]:
    """Those that go on: not finished, refused or expired. Newest first; `after` as everywhere."""
    return page_of_project(
        session,
        Upload,
        "upload",
        project_id,
        after,
        limit,
        Upload.finished_at.is_(None),
        Upload.expires_at > now(session),
    )


def prolong(session: Session, id: str, *, lasts_seconds: float) -> Upload:
    """More bytes came: it expires so long after them."""
    upload = session.get(Upload, id)
    if upload is None:
        raise NotFound("upload", id)
    upload.expires_at = now(session) + timedelta(seconds=lasts_seconds)
    return upload


def finish(
    session: Session,
    id: str,
    *,
    record_id: str | None = None,
    error: Mapping[str, Any] | None = None,
) -> None:
    """What it came to. NotFound where it was deleted meanwhile, so that nothing comes of it."""
    upload = session.get(Upload, id)
    if upload is None:
        raise NotFound("upload", id)
    upload.finished_at = now(session)
    upload.record_id = record_id
    upload.error = None if error is None else dict(error)


def delete_upload(session: Session, id: str, *, project_id: str) -> None:
    session.delete(get_upload(session, id, project_id=project_id))


# --- sweeping ---------------------------------------------------------------------------


def unfinished_here(database: Database, data_dir: Path) -> list[Upload]:
    """Uploads whose bytes are all on this host and of which nothing has come yet: a process was
    killed while it inspected them, or the store took nothing."""
    ids = _gathering(data_dir)
    if not ids:
        return []
    with database.reading() as session:
        at = now(session)
        found = session.scalars(
            select(Upload).where(Upload.finished_at.is_(None), Upload.expires_at > at)
        )
        return [
            upload
            for upload in found
            if upload.id in ids
            and offset_of(gathering_file(data_dir, upload.id)) == upload.size_bytes
        ]


def remove_expired(database: Database, data_dir: Path, *, limit: int = 1000) -> list[str]:
    """Deletes records that have expired, and of this host's files those that have no record any
    more and that nobody writes; their ids. Safe to run many times at once."""
    with database.reading() as session:
        expired = session.scalars(
            select(Upload.id).where(Upload.expires_at <= now(session)).limit(limit)
        ).all()
    removed = set()
    for id in expired:
        with held_file(gathering_file(data_dir, id)) as held:
            if not held:
                continue  # bytes are coming in; its time will be prolonged
            with database.transaction() as session:
                upload = session.get(Upload, id)
                if upload is not None and upload.expires_at <= now(session):
                    session.delete(upload)
                    removed.add(id)
    here = _gathering(data_dir)
    if here:
        with database.reading() as session:
            known = set(session.scalars(select(Upload.id).where(Upload.finished_at.is_(None))))
        for id in here - known:
            with held_file(gathering_file(data_dir, id)) as held:
                if held:
                    remove_file(gathering_file(data_dir, id))
                    removed.add(id)
    return sorted(removed)


def remove_file(file: Path) -> None:
    unchecked_mark(file).unlink(missing_ok=True)
    file.unlink(missing_ok=True)


@contextmanager
def held_file(file: Path) -> Iterator[bool]:
    """Whether nobody else writes the file, as long as the block lasts; True too where there is
    no such file."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def _gathering(data_dir: Path) -> set[str]:
    try:
        names = os.listdir(data_dir / FOLDER)
    except FileNotFoundError:
        return set()
    return {name.removesuffix(UNCHECKED_SUFFIX) for name in names}
