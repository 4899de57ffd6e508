"""Artifacts: their records, and their bytes with Range, a strong ETag and Repr-Digest."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator
from pathlib import PurePosixPath
from typing import Annotated
from urllib.parse import quote

from anyio import to_thread
from fastapi import APIRouter, Path, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from api.deps import PrincipalDep, Services, ServicesDep
from api.errors import ApiError
from api.schemas import ArtifactOut, Id
from jobs import deletion, records, store
from jobs.artifacts import Block
from jobs.errors import ObjectMissing

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"])
ArtifactId = Annotated[Id, Path(examples=["art_3q2-7wAAQkSgMvUuTqBvxQ"])]

_RANGE = re.compile(r"bytes=\s*([0-9]{0,18})-([0-9]{0,18})\s*", re.IGNORECASE)
_ETAG_IN_LIST = re.compile(r'\s*(W/)?("[^"]*")\s*(?:,|$)')


@router.get("/{artifact_id}", summary="An artifact's record")
def get_artifact(
    artifact_id: ArtifactId, services: ServicesDep, principal: PrincipalDep
) -> ArtifactOut:
    with services.database.reading() as session:
        return ArtifactOut.of(
            store.get_artifact(session, artifact_id, project_id=principal.project_id)
        )


@router.delete(
    "/{artifact_id}",
    status_code=204,
    summary="Delete an artifact",
    description="Its bytes; the job and its report stay, and the artifact is 410 from then on.",
    response_class=Response,
)
def delete_artifact(
    artifact_id: ArtifactId, services: ServicesDep, principal: PrincipalDep
) -> Response:
    with services.database.transaction() as session:
        deletion.delete_artifact(session, principal.actor, artifact_id)
    return Response(status_code=204)


@router.get(
    "/{artifact_id}/content",
    summary="An artifact's bytes",
    description="Streams the file. One `Range` is honoured (206, 416), with `If-Range`; several "
    "are answered with the whole. `If-None-Match` gives 304. `ETag` is the hex SHA-256, "
    "`Repr-Digest` the same as RFC 9530 writes it; both are of the whole file. Where the "
    "installation keeps artifacts in S3 and is set so, the answer is a redirect (307) to an "
    "address that holds for a short time and needs no API key.",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "The whole file."},
        206: {"content": {"application/octet-stream": {}}, "description": "The range asked for."},
        304: {"description": "The file that the client has is this one."},
        307: {"description": "Where to get the file."},
    },
)
async def get_artifact_content(
    request: Request, artifact_id: ArtifactId, services: ServicesDep, principal: PrincipalDep
) -> Response:
    artifact = await run_in_threadpool(_find, services, artifact_id, principal.project_id)
    await to_thread.run_sync(_check_stored, services, artifact, limiter=services.storing)
    headers = _headers_of(artifact)
    if (unchanged := _unchanged(request, headers)) is not None:
        return unchanged
    if getattr(request.state, "head", False):  # for which no Range is defined
        headers["Content-Length"] = str(artifact.size_bytes)
        return Response(headers=headers, media_type=artifact.media_type)
    elsewhere = await to_thread.run_sync(
        _handed_over, services, artifact, headers, limiter=services.storing
    )
    if elsewhere is not None:
        return elsewhere
    span = None
    if_range = request.headers.get("if-range")
    if if_range is None or if_range.strip() == headers["ETag"]:
        span = parse_range(request.headers.get("range"), artifact.size_bytes)
    start, end = span or (0, artifact.size_bytes)
    headers["Content-Length"] = str(end - start)
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{artifact.size_bytes}"
    body: AsyncIterator[Block] = _nothing()
    if end > start:
        body = await _opened(services.store.read(artifact.key, start, end))
    return StreamingResponse(
        body,
        status_code=206 if span is not None else 200,
        headers=headers,
        media_type=artifact.media_type,
    )


def _headers_of(artifact: records.Artifact) -> dict[str, str]:
    digest = base64.b64encode(bytes.fromhex(artifact.sha256)).decode()
    return {
        "ETag": f'"{artifact.sha256}"',
        "Repr-Digest": f"sha-256=:{digest}:",
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": content_disposition(PurePosixPath(artifact.path).name),
    }


def _unchanged(request: Request, headers: dict[str, str]) -> Response | None:
    """304 where the client has the file already; ApiError 412 where it wants another one."""
    if_match = request.headers.get("if-match")
    if if_match is not None and not matches(if_match, headers["ETag"], weak=False):
        raise ApiError(
            412,
            "precondition-failed",
            "The file is not the one that If-Match names.",
            headers={"ETag": headers["ETag"]},
        )
    if_none_match = request.headers.get("if-none-match")
    if if_none_match is not None and matches(if_none_match, headers["ETag"], weak=True):
        return Response(status_code=304, headers=headers)
    return None


def _handed_over(
    services: Services, artifact: records.Artifact, headers: dict[str, str]
) -> Response | None:
    """The answer that has another server send the bytes, where the settings say so. The address
    is made of the record's key alone; nothing of a request goes into it."""
    settings = services.settings
    if settings.signed_url_seconds:
        url = services.store.signed_url(artifact.key, seconds=settings.signed_url_seconds)
        if url is not None:
            return Response(
                status_code=307, headers={"Location": url, "Cache-Control": "private, no-store"}
            )
    if settings.accel_prefix is not None:
        path = services.store.path_in_folder(artifact.key)
        if path is not None:
            headers = {**headers, "X-Accel-Redirect": settings.accel_prefix + path}
            return Response(headers=headers, media_type=artifact.media_type)
    return None


def _find(services: Services, artifact_id: str, project_id: str) -> records.Artifact:
    with services.database.reading() as session:
        return store.get_artifact(session, artifact_id, project_id=project_id)


def _check_stored(services: Services, artifact: records.Artifact) -> None:
    stored = services.store.size(artifact.key)
    if stored is None:
        services.store.check()
    if stored != artifact.size_bytes:
        # Before the first byte goes out: afterwards the answer could no longer say so.
        raise ObjectMissing(f"{artifact.id} has {artifact.size_bytes} bytes, stored are {stored}.")


async def _nothing() -> AsyncIterator[Block]:
    return
    yield b""


async def _opened(blocks: AsyncIterator[Block]) -> AsyncIterator[Block]:
    """`blocks` with its first one already read, so that a missing object is still an answer."""
    first = await anext(blocks)

    async def all_blocks() -> AsyncIterator[Block]:
        yield first
        async for block in blocks:
            yield block

    return all_blocks()


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The bytes [start, end) that a Range header asks for; None where it is to be ignored
    (absent, malformed, another unit, several ranges: RFC 9110 14.2 lets a server answer with
    the whole). ApiError 416 where it lies outside the `size` bytes."""
    match = _RANGE.fullmatch(header or "")
    if match is None or (not match[1] and not match[2]):
        return None
    if not match[1]:  # the last n bytes
        start, end = max(0, size - int(match[2])), size
    else:
        start = int(match[1])
        end = min(size, int(match[2]) + 1) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None
    if start >= end:
        raise ApiError(
            416,
            "range-not-satisfiable",
            f"The file has {size} bytes; the range lies outside it.",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, end


def matches(header: str, etag: str, *, weak: bool) -> bool:
    """Whether a list of entity tags (or `*`) names `etag`, by weak or strong comparison."""
    if header.strip() == "*":
        return True
    return any(
        tag == etag and (weak or not is_weak) for is_weak, tag in _ETAG_IN_LIST.findall(header)
    )


def content_disposition(name: str) -> str:
    """`attachment` under `name`, in the form of RFC 6266 where it is not plain ASCII."""
    plain = re.sub(r"[^A-Za-z0-9 ._()+-]", "_", name)
    extended = "" if plain == name else f"; filename*=UTF-8''{quote(name, safe='')}"
    return f'attachment; filename="{plain}"{extended}'
