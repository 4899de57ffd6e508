"""Resumable uploads: tus 1.0 (https://tus.io/protocols/resumable-upload) with the extensions
creation, creation-with-upload, termination, checksum and expiration.

An upload is made with what it is to become; once its last byte is there it is inspected as a plain
one is, and becomes a model or dataset. The answer to that last PATCH has its `Location`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC
from email.utils import format_datetime
from typing import Annotated, Any

import anyio
import structlog
from fastapi import APIRouter, Header, Path, Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.auth import lies_below
from api.datasets import DATASET
from api.deps import After, Limit, PrincipalDep, Services, ServicesDep
from api.errors import ApiError, domain_problem
from api.gathering import Writer
from api.intake import take_in
from api.models import MODEL
from api.schemas import Id, Page, UploadOut
from api.uploads import (
    MAX_NAME_BYTES,
    UploadedFile,
    bounded_body,
    cut_short,
    declared_length,
    full_disk_told,
    safe_name,
    too_large,
)
from compression.errors import CompressionError
from jobs import access, quotas, resumable
from jobs.access import Actor
from jobs.blobs import hold_project
from jobs.errors import Conflict, JobsError, NotFound, StoreFull, UploadRejected
from jobs.records import Upload
from jobs.roles import Role

VERSION = "1.0.0"
PREFIX = "/v1/uploads"
EXTENSIONS = "creation,creation-with-upload,termination,checksum,expiration"
BODY_TYPE = "application/offset+octet-stream"
CHECKSUMS = ("sha1", "sha256", "sha512", "md5")
KINDS = {kind.word: kind for kind in (MODEL, DATASET)}
_MAX_METADATA = 4096
_CHECKSUM = re.compile(r"([a-z0-9]+) +([A-Za-z0-9+/]+={0,2})")
_BLOCK = 1 << 20
# Between two attempts to take in what has arrived: at first, and at most.
RETRY_SECONDS, MAX_RETRY_SECONDS = 60.0, 3600.0

router = APIRouter(prefix=PREFIX, tags=["uploads"])
UploadId = Annotated[Id, Path(examples=["upl_3q2-7wAAQkSgMvUuTqBvxQ"])]
Version = Annotated[str | None, Header(description=f"`{VERSION}`")]
Checksum = Annotated[
    str | None,
    Header(description=f"`<algorithm> <base64>` of this body; one of {', '.join(CHECKSUMS)}."),
]
_log = structlog.get_logger(__name__)


class Protocol:
    """What tus says of every request below its prefix: `Tus-Resumable` in each answer, and
    `X-HTTP-Method-Override` for clients that cannot send PATCH or DELETE. Outside of the
    authorization, which is then asked about the method that is meant."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not lies_below(scope["path"], PREFIX):
            await self.app(scope, receive, send)
            return
        meant = Headers(scope=scope).get("x-http-method-override", "").upper()
        gathering = scope["app"].state.services.gathering
        scope.setdefault("state", {})["arrival"] = gathering.arrive()
        asked = scope
        if scope["method"] == "POST" and meant in ("PATCH", "DELETE"):
            asked = {**scope, "method": meant}

        async def telling_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Tus-Resumable"] = VERSION
            await send(message)

        try:
            await self.app(asked, receive, telling_send)
        finally:
            scope["route"] = asked.get("route")  # for those outside, who count by it


def _body_openapi(*, required: bool) -> dict[str, Any]:
    schema = {"type": "string", "format": "binary"}
    return {"requestBody": {"required": required, "content": {BODY_TYPE: {"schema": schema}}}}


@router.options("", status_code=204, summary="What of tus is understood", response_class=Response)
def describe(services: ServicesDep, principal: PrincipalDep) -> Response:
    return Response(
        status_code=204,
        headers={
            "Tus-Version": VERSION,
            "Tus-Extension": EXTENSIONS,
            "Tus-Max-Size": str(services.settings.max_upload_bytes),
            "Tus-Checksum-Algorithm": ",".join(CHECKSUMS),
        },
    )


@router.get(
    "",
    summary="Unfinished resumable uploads, newest first",
    description="Those that may go on: what was finished, refused, given up or has expired is not "
    "among them. `offset` is what has arrived on the host that answers.",
)
def list_uploads(
    services: ServicesDep, principal: PrincipalDep, after: After = None, limit: Limit = 50
) -> Page[UploadOut]:
    with services.database.reading() as session:
        found = resumable.list_uploads(
            session, project_id=principal.project_id, after=after, limit=limit + 1
        )

    def shown(upload: Upload) -> UploadOut:
        return UploadOut.of(upload, offset=services.gathering.offset_now(upload.id), record=None)

    return Page[UploadOut].of(found, limit, shown)


@router.post(
    "",
    status_code=201,
    summary="Begin a resumable upload",
    description="tus 1.0, creation. `Upload-Metadata` says what it is to become: `kind` "
    "(`model` or `dataset`) and `filename` (an archive, or the single file of a dataset), and may "
    "give a `name`. `Location` is where its bytes go. With a body of the type "
    f"`{BODY_TYPE}` the first bytes come along.",
    response_class=Response,
    responses={201: {"description": "Send the bytes to `Location` by PATCH."}},
    openapi_extra=_body_openapi(required=False),
)
async def create_upload(
    request: Request,
    services: ServicesDep,
    principal: PrincipalDep,
    upload_length: Annotated[int, Header(ge=0, description="Bytes of the whole file.")],
    upload_metadata: Annotated[
        str, Header(description="`key base64,key base64`: kind, filename, name.")
    ] = "",
    tus_resumable: Version = None,
    upload_checksum: Checksum = None,
    content_type: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> Response:
    _check_version(tus_resumable, needed=True)
    if upload_length > services.settings.max_upload_bytes:
        raise too_large(services.settings.max_upload_bytes)
    if upload_length == 0:
        raise ApiError(400, "invalid-upload", "The file is empty.")
    wanted = _read_metadata(upload_metadata)
    with_upload = content_type is not None and content_type.strip().lower() == BODY_TYPE
    if not with_upload and (declared_length(request) or 0) > 0:
        raise _wrong_body()
    upload = await run_in_threadpool(
        _create, services, principal.actor, wanted, upload_metadata, upload_length
    )
    headers = {"Location": f"{PREFIX}/{upload.id}", "Upload-Expires": _expires(upload)}
    if with_upload:
        done = await _receive(request, services, principal.actor, upload, 0, upload_checksum)
        headers |= {**done, "Location": headers["Location"]}
    return Response(status_code=201, headers=headers)


@router.patch(
    "/{upload_id}",
    status_code=204,
    summary="Send bytes of a resumable upload",
    description="tus 1.0. `Upload-Offset` must be the offset that HEAD tells. The answer to the "
    "last bytes comes after the inspection and has the new model's or dataset's `Location`; what "
    "inspection refuses is a problem (422) as with a plain upload. Where the store could not take "
    "it (507), an empty PATCH at the end tries again. 460: the body is not what `Upload-Checksum` "
    "says; nothing of it was kept.",
    response_class=Response,
    responses={204: {"description": "`Upload-Offset` is where to go on."}},
    openapi_extra=_body_openapi(required=True),
)
async def append_to_upload(
    request: Request,
    upload_id: UploadId,
    services: ServicesDep,
    principal: PrincipalDep,
    upload_offset: Annotated[int, Header(ge=0)],
    tus_resumable: Version = None,
    upload_checksum: Checksum = None,
    content_type: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> Response:
    _check_version(tus_resumable, needed=True)
    if content_type is None or content_type.strip().lower() != BODY_TYPE:
        raise _wrong_body()
    upload = await run_in_threadpool(_find, services, upload_id, principal.project_id)
    headers = await _receive(
        request, services, principal.actor, upload, upload_offset, upload_checksum
    )
    return Response(status_code=204, headers=headers)


@router.get(
    "/{upload_id}",
    summary="A resumable upload",
    description="How far it is, and what it came to. HEAD is tus's: `Upload-Offset`, "
    "`Upload-Length`, `Upload-Metadata`; a submitter's ends a request that may still be sending "
    "bytes, as whoever asks is about to go on.",
    response_model=UploadOut,
)
async def get_upload(
    request: Request,
    upload_id: UploadId,
    services: ServicesDep,
    principal: PrincipalDep,
    tus_resumable: Version = None,
) -> Response:
    _check_version(tus_resumable, needed=False)
    upload = await run_in_threadpool(_find, services, upload_id, principal.project_id)
    if upload.finished_at is not None:
        offset = upload.size_bytes
    elif getattr(request.state, "head", False) and principal.role.includes(Role.SUBMITTER):
        offset = await services.gathering.offset(upload.id, request.state.arrival)
    else:
        offset = services.gathering.offset_now(upload.id)
    headers = {
        "Upload-Offset": str(offset),
        "Upload-Length": str(upload.size_bytes),
        "Upload-Expires": _expires(upload),
        "Cache-Control": "no-store",
    }
    if upload.metadata_sent:
        headers["Upload-Metadata"] = upload.metadata_sent
    if upload.record_id is not None:
        headers["Location"] = _record_path(upload.kind, upload.record_id)
    body = UploadOut.of(upload, offset=offset, record=headers.get("Location"))
    return JSONResponse(body.model_dump(mode="json"), headers=headers)


@router.delete(
    "/{upload_id}",
    status_code=204,
    summary="Give up a resumable upload",
    description="tus 1.0, termination. What it has become already stays.",
    response_class=Response,
)
async def delete_upload(
    request: Request,
    upload_id: UploadId,
    services: ServicesDep,
    principal: PrincipalDep,
    tus_resumable: Version = None,
) -> Response:
    _check_version(tus_resumable, needed=False)
    await run_in_threadpool(_find, services, upload_id, principal.project_id)
    async with services.gathering.writing(upload_id, request.state.arrival) as writer:
        await run_in_threadpool(_delete, services, principal.actor, upload_id)
        writer.remove()
    services.gathering.forget(upload_id)
    return Response(status_code=204)


Waits = dict[str, tuple[float, float]]  # by upload: when it is due again, and the pause after that


async def sweep(services: Services) -> None:
    """What a process of the API does besides answering: it finishes what was left, and removes
    what has expired from this host, again and again."""
    waits: Waits = {}
    while True:
        try:
            await _finish_left(services, waits)
            await anyio.to_thread.run_sync(
                resumable.remove_expired, services.database, services.settings.data_dir
            )
            services.gathering.forget_gone()
        except Exception:
            _log.exception("upload.sweep_failed")
        await anyio.sleep(services.settings.reconcile_seconds)


async def _finish_left(services: Services, waits: Waits) -> None:
    """Goes on with uploads whose bytes are all here and of which nothing has come: a process ended
    while it inspected them, or the store did not take them. Clients find all bytes there and send
    nothing any more, so this goes on, later and later, until they expire."""
    left = await anyio.to_thread.run_sync(
        resumable.unfinished_here, services.database, services.settings.data_dir
    )
    for upload_id in waits.keys() - {upload.id for upload in left}:
        del waits[upload_id]
    for upload in left:
        due, pause = waits.get(upload.id, (0.0, RETRY_SECONDS))
        if anyio.current_time() < due:
            continue
        actor = Actor(upload.project_id, upload.key_id)
        try:
            arrival = services.gathering.arrive()
            async with services.gathering.writing(upload.id, arrival) as writer:
                writer.is_complete = True
                found = await run_in_threadpool(_find, services, upload.id, upload.project_id)
                if found.finished_at is None and writer.offset == upload.size_bytes:
                    await _finish(services, actor, upload, writer)
        except Exception as error:
            if isinstance(error, UploadRejected):  # there is no request whose answer counts it
                services.metrics.upload_refused(error.code)
            _log.warning("upload.not_finished", upload=upload.id, error=str(error))
        waits[upload.id] = anyio.current_time() + pause, min(2 * pause, MAX_RETRY_SECONDS)


# --- receiving --------------------------------------------------------------------------


async def _receive(
    request: Request,
    services: Services,
    actor: Actor,
    upload: Upload,
    offset: int,
    checksum: str | None,
) -> dict[str, str]:
    """Appends the request's body, and finishes the upload where that was all; the headers of the
    answer."""
    expected = None if checksum is None else _read_checksum(checksum)
    left = upload.size_bytes - offset
    declared = declared_length(request)
    if upload.finished_at is not None:
        _check_offset(offset, upload.size_bytes)
        return _done(upload)
    async with services.gathering.writing(upload.id, request.state.arrival) as writer:
        upload = await run_in_threadpool(_find, services, upload.id, upload.project_id)
        if upload.finished_at is not None:
            writer.remove()  # the empty file that was made to be locked
            _check_offset(offset, upload.size_bytes)
            return _done(upload)
        _check_offset(offset, writer.offset)
        refusal = ApiError(
            413, "upload-too-large", f"{left} bytes of the upload are left, and more were sent."
        )
        if declared is not None and declared > left:
            raise refusal
        await run_in_threadpool(_prolong, services, upload.id)
        body = bounded_body(request, max_bytes=left, declared=declared, refusal=refusal)
        async with _prolonging(services, upload.id):
            try:
                with full_disk_told():
                    if expected is None:
                        await writer.append(body)
                    else:
                        await _append_checked(writer, body, *expected)
                if writer.superseded:
                    raise cut_short("A newer request goes on with this upload.")
            except ApiError:
                if writer.offset < upload.size_bytes:
                    raise
                # All of it is here. HEAD will say so, and nobody would come to have it inspected.
            at = writer.offset
            upload = await run_in_threadpool(_prolong, services, upload.id)
            if at == upload.size_bytes:
                writer.is_complete = True
                upload = await _finish(services, actor, upload, writer)
                services.gathering.forget(upload.id)
                return _done(upload)
    return {"Upload-Offset": str(at), "Upload-Expires": _expires(upload)}


async def _append_checked(
    writer: Writer, body: AsyncIterator[bytes], algorithm: str, expected: bytes
) -> None:
    """Appends a body whose checksum is `expected`, or nothing: of one that is cut short it cannot
    be known what it would have been."""
    before = writer.offset
    mark = resumable.unchecked_mark(writer.file)
    mark.write_text(str(before))
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    holds = False
    try:
        await writer.append(body, hasher)
        holds = hasher.digest() == expected
    finally:
        if not holds:
            writer.truncate(before)
        mark.unlink(missing_ok=True)
    if not holds and not writer.superseded:
        raise ApiError(
            460,
            "checksum-mismatch",
            f"The body's {algorithm} is {base64.b64encode(hasher.digest()).decode()}; nothing of "
            "it was kept. Send it again.",
            title="The checksum does not hold",
        )


async def _finish(services: Services, actor: Actor, upload: Upload, writer: Writer) -> Upload:
    """Takes the whole file in; the upload with what it came to. The file is gone then, unless
    the store could not take it: that may be tried again."""
    kind: Any = KINDS[upload.kind]
    async with services.spool.upload_folder() as folder:
        received = folder / "received"
        received.mkdir()
        path = received / upload.filename
        os.link(writer.file, path, follow_symlinks=False)
        digest = await anyio.to_thread.run_sync(_sha256, path, limiter=services.storing)
        file = UploadedFile(upload.filename, path, upload.size_bytes, digest)
        try:
            await take_in(
                services,
                actor,
                kind,
                [file],
                folder,
                name=upload.name,
                also=lambda session, record: resumable.finish(
                    session, upload.id, record_id=record.id
                ),
            )
        except (UploadRejected, CompressionError) as error:
            await run_in_threadpool(_refuse, services, upload.id, error)
            writer.remove()
            raise
    writer.remove()
    return await run_in_threadpool(_find, services, upload.id, upload.project_id)


def _check_offset(offset: int, at: int) -> None:
    if offset != at:
        raise ApiError(
            409,
            "upload-offset",
            f"The upload has {at} bytes, Upload-Offset says {offset}; ask with HEAD.",
            headers={"Upload-Offset": str(at)},
        )


def _done(upload: Upload) -> dict[str, str]:
    headers = {"Upload-Offset": str(upload.size_bytes), "Upload-Expires": _expires(upload)}
    if upload.record_id is None:
        raise Conflict(
            f"The upload was refused: {(upload.error or {}).get('detail', '')}", code="upload-ended"
        )
    return {**headers, "Location": _record_path(upload.kind, upload.record_id)}


# --- records ----------------------------------------------------------------------------


def _create(
    services: Services,
    actor: Actor,
    wanted: dict[str, str | None],
    metadata: str,
    size_bytes: int,
) -> Upload:
    folder = services.settings.data_dir / resumable.FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    if shutil.disk_usage(folder).free < size_bytes:
        raise StoreFull("The disk that uploads are received on has no room for so much.")
    with services.database.transaction() as session:
        hold_project(session, actor.project_id)
        upload = resumable.add_upload(
            session,
            project_id=actor.project_id,
            key_id=actor.key_id,
            kind=str(wanted["kind"]),
            filename=str(wanted["filename"]),
            name=wanted["name"],
            metadata_sent=metadata,
            size_bytes=size_bytes,
            lasts_seconds=services.settings.upload_expires_seconds,
        )
        quotas.check_upload(session, actor.project_id)
        access.record_action(
            session, actor, "upload.created", upload.id, kind=upload.kind, size_bytes=size_bytes
        )
    return upload


def _find(services: Services, upload_id: str, project_id: str) -> Upload:
    with services.database.reading() as session:
        return resumable.get_upload(session, upload_id, project_id=project_id)


def _prolong(services: Services, upload_id: str) -> Upload:
    with services.database.transaction() as session:
        return resumable.prolong(
            session, upload_id, lasts_seconds=services.settings.upload_expires_seconds
        )


@asynccontextmanager
async def _prolonging(services: Services, upload_id: str) -> AsyncIterator[None]:
    """While bytes come or are inspected, of which no other host knows."""

    async def keep_on() -> None:
        while True:
            await asyncio.sleep(services.settings.upload_expires_seconds / 4)
            try:
                await run_in_threadpool(_prolong, services, upload_id)
            except NotFound:
                return  # deleted meanwhile, as its end will be told
            except SQLAlchemyError as error:
                _log.warning("upload.not_prolonged", upload=upload_id, error=str(error))

    task = asyncio.create_task(keep_on())
    try:
        yield
    finally:
        task.cancel()


def _refuse(services: Services, upload_id: str, error: JobsError | CompressionError) -> None:
    with services.database.transaction() as session:
        try:
            resumable.finish(session, upload_id, error=domain_problem(error))
        except NotFound:
            return  # deleted meanwhile: nobody will ask


def _delete(services: Services, actor: Actor, upload_id: str) -> None:
    with services.database.transaction() as session:
        resumable.delete_upload(session, upload_id, project_id=actor.project_id)
        access.record_action(session, actor, "upload.deleted", upload_id)


# --- headers ----------------------------------------------------------------------------


def _check_version(version: str | None, *, needed: bool) -> None:
    if version == VERSION or (version is None and not needed):
        return
    raise ApiError(
        412,
        "tus-version",
        f"Send the header Tus-Resumable: {VERSION}; this is the version that is spoken here.",
        headers={"Tus-Version": VERSION},
    )


def _wrong_body() -> ApiError:
    return ApiError(
        415, "unsupported-media-type", f"Send the bytes with the header Content-Type: {BODY_TYPE}."
    )


def _read_metadata(header: str) -> dict[str, str | None]:
    """`kind`, `filename` and `name` of an Upload-Metadata header; the rest is the client's own."""
    if len(header) > _MAX_METADATA:
        raise _bad_metadata(f"it is longer than {_MAX_METADATA} characters")
    found: dict[str, str] = {}
    for pair in header.split(",") if header else ():
        key, _, encoded = pair.strip().partition(" ")
        if not key or key in found:
            raise _bad_metadata(f"the key {key[:80]!r} is empty or there twice")
        try:
            found[key] = base64.b64decode(encoded.strip(), validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError):
            raise _bad_metadata(f"the value of {key[:80]!r} is not base64 of UTF-8") from None
    kind = found.get("kind", "")
    if kind not in KINDS:
        raise _bad_metadata(
            f"`kind` must say what the upload is to become, {' or '.join(KINDS)}, not {kind[:80]!r}"
        )
    # Uppy's `name` is the file's, which is no name that anybody chose.
    filename = safe_name(found.get("filename") or found.get("name", ""))
    name = found.get("name", "").strip() or None
    if name == filename:
        name = None
    if name is not None and (len(name) > MAX_NAME_BYTES or not name.isprintable()):
        raise _bad_metadata(f"`name` must be 1 to {MAX_NAME_BYTES} printable characters")
    return {"kind": kind, "filename": filename, "name": name}


def _bad_metadata(reason: str) -> ApiError:
    return ApiError(400, "upload-metadata", f"Upload-Metadata cannot be used: {reason}.")


def _read_checksum(header: str) -> tuple[str, bytes]:
    match = _CHECKSUM.fullmatch(header.strip())
    try:
        if match is not None and match[1] in CHECKSUMS:
            expected = base64.b64decode(match[2], validate=True)
            if len(expected) == hashlib.new(match[1], usedforsecurity=False).digest_size:
                return match[1], expected
    except binascii.Error:
        pass
    raise ApiError(
        400,
        "upload-checksum",
        f"Write Upload-Checksum as an algorithm ({', '.join(CHECKSUMS)}), a space and the digest "
        "in base64.",
    )


def _expires(upload: Upload) -> str:
    return format_datetime(upload.expires_at.astimezone(UTC), usegmt=True)


def _record_path(kind: str, record_id: str) -> str:
    return f"{KINDS[kind].path}/{record_id}"


def _sha256(path: os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
