"""What becomes of an upload that has arrived: sandboxed inspection -> object store -> record. Where
any step refuses, nothing stays behind.

Objects first, the record last: a record never names an object that is not there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import anyio
import structlog
from fastapi import Request
from sqlalchemy.orm import Session

from api.deps import Services
from api.uploads import UploadedFile, declared_length, receive_upload
from jobs import access, blobs, quotas
from jobs.access import Actor
from jobs.errors import StoreUnreachable
from jobs.records import new_id
from jobs.settings import Settings

_log = structlog.get_logger(__name__)


class Inspection(Protocol):
    """What an inspection of either kind says: the names of its clean files, and more."""

    @property
    def files(self) -> Sequence[str]: ...


class Owner(Protocol):
    """The record that an upload becomes."""

    id: Any
    name: Any


I = TypeVar("I", bound=Inspection)  # noqa: E741
R = TypeVar("R", bound=Owner)
StoredFile = dict[str, Any]  # {"name", "key", "size_bytes", "sha256"}


@dataclass(frozen=True)
class Intake(Generic[I]):
    """What an upload came to: its files as they arrived, the inspection's finding, and the
    clean files that are in the object store now. `id`, `project_id` and `name` are the record's."""

    id: str
    project_id: str
    name: str
    uploads: list[dict[str, Any]]
    inspection: I
    files: list[StoredFile]

    @property
    def size_bytes(self) -> int:
        """Of the files as they arrived."""
        return sum(file["size_bytes"] for file in self.uploads)


@dataclass(frozen=True)
class Kind(Generic[I, R]):
    """What an upload may become. `inspect(files, out_dir, settings)` makes `out_dir` and leaves
    clean files in it; `add` makes the record in the transaction that it is given."""

    word: str
    path: str
    inspect: Callable[[list[Path], Path, Settings], I]
    add: Callable[[Session, Intake[I]], R]


async def upload(
    request: Request,
    services: Services,
    actor: Actor,
    kind: Kind[I, R],
    *,
    filename: str | None,
    name: str | None,
) -> R:
    """Receives a plain upload (api.uploads) and takes it in; the record, after its commit."""
    await anyio.to_thread.run_sync(
        _check_quotas, services, actor.project_id, declared_length(request) or 0
    )
    async with services.spool.upload_folder() as folder:
        received = folder / "received"
        received.mkdir()
        began = time.perf_counter()
        files = await receive_upload(
            request, received, max_bytes=services.settings.max_upload_bytes, filename=filename
        )
        _log.info(
            "upload.received",
            bytes=sum(file.size_bytes for file in files),
            ms=round(1000 * (time.perf_counter() - began), 1),
        )
        return await take_in(services, actor, kind, files, folder, name=name)


async def take_in(
    services: Services,
    actor: Actor,
    kind: Kind[I, R],
    files: Sequence[UploadedFile],
    folder: Path,
    *,
    name: str | None,
    also: Callable[[Session, R], None] = lambda session, record: None,
) -> R:
    """Inspects and stores what lies on this host's disk already; the record, after its commit.

    `folder` is the upload's own, gone afterwards; `also` is done in the record's transaction.
    """
    clean = folder / "clean"
    inspection = await anyio.to_thread.run_sync(
        kind.inspect,
        [file.path for file in files],
        clean,
        services.settings,
        limiter=services.inspections,
    )
    uploads = [
        {"name": file.name, "size_bytes": file.size_bytes, "sha256": file.sha256} for file in files
    ]
    intake = Intake(
        id=new_id(kind.word),
        project_id=actor.project_id,
        name=name or _default_name(files, kind.word),
        uploads=uploads,
        inspection=inspection,
        files=[],
    )
    return await anyio.to_thread.run_sync(
        partial(_store, services, actor, kind, intake, clean, also=also),
        limiter=services.storing,
    )


def _store(
    services: Services,
    actor: Actor,
    kind: Kind[I, R],
    intake: Intake[I],
    clean: Path,
    *,
    also: Callable[[Session, R], None],
) -> R:
    found = [(name, _sha256(clean / name), clean / name) for name in intake.inspection.files]
    with services.database.transaction() as session:
        wanted = blobs.want(
            session,
            intake.project_id,
            [(sha256, path.stat().st_size) for _, sha256, path in found],
        )
    try:
        stored = set()
        for (_, _, path), blob in zip(found, wanted, strict=True):
            if not blob.is_stored and blob.key not in stored:
                services.store.put_file(blob.key, path)
                stored.add(blob.key)
        with services.database.transaction() as session:
            keys = blobs.use(session, intake.project_id, intake.id, wanted)
            for name, sha256, path in found:
                size_bytes = path.stat().st_size
                file = {"name": name, "key": keys[sha256], "size_bytes": size_bytes}
                intake.files.append({**file, "sha256": sha256})
            record = kind.add(session, intake)
            also(session, record)
            quotas.check_upload(session, intake.project_id)
            access.record_action(
                session, actor, f"{kind.word}.uploaded", record.id, name=record.name
            )
        return record
    except StoreUnreachable:
        raise  # there is nothing to ask it: the reconciler deletes what nobody came to use
    except BaseException:
        _undo(services, wanted)
        raise


def _undo(services: Services, wanted: Sequence[blobs.Wanted]) -> None:
    try:
        with services.database.transaction() as session:
            keys = blobs.unwant(session, wanted)
        services.store.delete(keys)
    except Exception as error:  # the reconciler does it after a while
        _log.warning("upload.not_undone", error=str(error))


def _check_quotas(services: Services, project_id: str, size_bytes: int) -> None:
    with services.database.reading() as session:
        quotas.check_upload(session, project_id, more_bytes=size_bytes, more_uploads=1)


def _default_name(files: Sequence[UploadedFile], fallback: str) -> str:
    """The archive's name without its suffixes; `fallback` for several files."""
    if len(files) != 1:
        return fallback
    stem = files[0].name
    for suffix in (".gz", ".tgz", ".tar", ".zip", ".csv", ".tsv", ".jsonl", ".parquet"):
        stem = stem.removesuffix(suffix)
    return stem or fallback


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
