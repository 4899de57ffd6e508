"""A job's history: JSON by cursor, or server-sent events that end with the job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from api.auth import Principal
from api.deps import MAX_PAGE, JobId, PrincipalDep, Services, ServicesDep
from api.errors import ApiError
from api.live import Watcher
from api.schemas import EventOut, EventPage
from jobs import store
from jobs.states import JobState

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

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
    last = await run_in_threadpool(_last_event, services, job_id, project_id)
    return EventStream(services, job_id, principal, after=after, last=last)


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


def _last_event(services: Services, job_id: str, project_id: str) -> int:
    with services.database.reading() as session:
        return store.get_job(session, job_id, project_id=project_id).last_event


class EventStream(StreamingResponse):
    """It counts as a watcher from before its first byte until it has gone, however it goes."""

    media_type = EVENT_STREAM

    def __init__(
        self, services: Services, job_id: str, principal: Principal, *, after: int, last: int
    ) -> None:
        # Proxies that gather a response before they pass it on would hold the events back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Vary": "Accept"}
        super().__init__(_nothing(), headers=headers)
        self._services = services
        self._watching = services.live.watching(job_id, principal, after=after, last=last)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("state", {}).get("head", False):
            await super().__call__(scope, receive, send)
            return
        with self._watching as watcher:
            self.body_iterator = self._events(watcher)
            await super().__call__(scope, receive, send)

    async def _events(self, watcher: Watcher) -> AsyncIterator[bytes]:
        yield b": connected\n\n"  # so that the headers go out at once
        quiet_since = time.monotonic()
        while watcher.holds and not self._services.stopping.is_set():
            moved = watcher.feed.moved
            content = watcher.take()
            if content is None:
                content = await self._services.live.read_page(watcher)
            if content:
                yield content
                quiet_since = time.monotonic()
            elif watcher.is_done:
                return
            elif (left := quiet_since + KEEP_ALIVE_SECONDS - time.monotonic()) > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await moved.wait()
            else:
                yield KEEPALIVE_COMMENT
                quiet_since = time.monotonic()


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""
