"""A job's history: JSON by cursor, or server-sent events that end with the job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.concurrency import run_in_threadpool

from api.auth import Principal
from api.deps import MAX_PAGE, JobId, PrincipalDep, Services, ServicesDep
from api.errors import ApiError
from api.schemas import EventOut, EventPage
from jobs import access, store
from jobs.states import JobState

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

POLL_SECONDS = 0.5
KEEP_ALIVE_SECONDS = 15.0
EVENT_STREAM = "text/event-stream"
MAX_NUMBER = 2**31 - 1


@router.get(
    "/{job_id}/events",
    summary="A job's history",
    description="JSON by cursor: ask again with `after` = `next` until `ended`. With `Accept: "
    "text/event-stream` the same events come as they happen, each with its number as `id`; "
    "`Last-Event-ID` takes up where a connection broke. The stream ends after the job's last "
    "event, or when its key is revoked.",
    response_model=EventPage,
    responses={200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}}},
)
async def list_events(
    request: Request,
    job_id: JobId,
    services: ServicesDep,
    principal: PrincipalDep,
    after: Annotated[
        int, Query(ge=0, le=MAX_NUMBER, description="Number of the last event seen.")
    ] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    last_event_id: Annotated[
        str | None, Header(description="As EventSource sends it; comes before `after`.")
    ] = None,
) -> Response:
    project_id = principal.project_id
    if not prefers_event_stream(request.headers.get("accept", "")):
        page = await run_in_threadpool(_page, services, job_id, project_id, after, limit)
        return JSONResponse(page.model_dump(mode="json"), headers={"Vary": "Accept"})
    if last_event_id is not None:
        if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 10):
            raise ApiError(
                400, "invalid-last-event-id", "Last-Event-ID is not the number of an event."
            )
        after = int(last_event_id)
    first = await run_in_threadpool(_page, services, job_id, project_id, after, MAX_PAGE)
    stream = _stream(services, job_id, principal, first)
    return StreamingResponse(
        _nothing() if getattr(request.state, "head", False) else stream,
        media_type=EVENT_STREAM,
        # Proxies that gather a response before they pass it on would hold the events back.
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Vary": "Accept"},
    )


def prefers_event_stream(accept: str) -> bool:
    """Whether an Accept header names text/event-stream with at least JSON's weight."""
    weights = {}
    for item in accept.split(","):
        media_type, *parameters = (part.strip().lower() for part in item.split(";"))
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                with suppress(ValueError):
                    weight = float(parameter[2:])
        weights[media_type] = weight
    wanted = weights.get(EVENT_STREAM, 0.0)
    return wanted > 0 and wanted >= weights.get("application/json", 0.0)


def _page(services: Services, job_id: str, project_id: str, after: int, limit: int) -> EventPage:
    with services.database.reading() as session:
        job = store.get_job(session, job_id, project_id=project_id)
        found = store.list_events(session, job_id, project_id=project_id, after=after, limit=limit)
        reached = found[-1].number if found else after
        return EventPage(
            items=[EventOut.of(event) for event in found],
            next=reached,
            ended=JobState(job.state).is_final and reached >= job.last_event,
        )


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


async def _stream(
    services: Services, job_id: str, principal: Principal, page: EventPage
) -> AsyncIterator[bytes]:
    """Each poll is a transaction of its own: an open stream holds no connection. A key that is
    revoked meanwhile, or expires, sees no more."""
    quiet_since = time.monotonic()
    yield b": connected\n\n"  # so that the headers go out at once
    while True:
        for event in page.items:
            yield format_sse_event(
                data_str=event.model_dump_json(), event=event.kind, id=str(event.number)
            )
        if page.ended or services.stopping.is_set():
            return
        if page.items:
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since >= KEEP_ALIVE_SECONDS:
            quiet_since = time.monotonic()
            yield KEEPALIVE_COMMENT
        if len(page.items) < MAX_PAGE:
            with suppress(TimeoutError):
                await asyncio.wait_for(services.stopping.wait(), POLL_SECONDS)
        page = await run_in_threadpool(
            _page, services, job_id, principal.project_id, page.next, MAX_PAGE
        )
        if not await run_in_threadpool(_key_holds, services, principal.key_id):
            return  # after the page was read, so that nothing newer than the end gets out


def _key_holds(services: Services, key_id: str) -> bool:
    with services.database.reading() as session:
        return access.key_holds(session, key_id)
