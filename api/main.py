"""create_app: wiring only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from api import (
    artifacts,
    audit,
    datasets,
    docs,
    events,
    health,
    keys,
    models,
    projects,
    selection,
    workers,
)
from api import jobs as jobs_routes
from api.auth import Authentication
from api.authorization import Authorization
from api.deps import Services
from api.errors import install_error_handlers
from api.idempotency import HEADER as IDEMPOTENCY_KEY
from api.idempotency import REPLAYED, Idempotency
from api.limits import RateLimit, make_counter
from api.middleware import BodyLimit, CloseUnread, HeadAsGet, RequestLog
from api.spool import Spool
from jobs.artifacts import open_store
from jobs.db import Database
from jobs.queue import make_celery
from jobs.settings import Settings

MAX_JSON_BYTES = 1 << 20
ROUTES = (
    models,
    datasets,
    jobs_routes,
    selection,
    events,
    artifacts,
    workers,
    projects,
    keys,
    audit,
    health,
    docs,
)
# What pages of other origins may send, and may read beside what every page may. Keys travel in a
# header of their own making, never in a cookie: there are no credentials that a browser adds.
CORS: dict[str, Any] = {
    "allow_methods": ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"),
    "allow_headers": (
        "Authorization",
        "Content-Disposition",
        "Content-Type",
        IDEMPOTENCY_KEY,
        "If-Match",
        "If-None-Match",
        "If-Range",
        "Last-Event-ID",
        "Range",
        "X-Request-ID",
    ),
    "expose_headers": (
        "Accept-Ranges",
        "Content-Disposition",
        "Content-Range",
        "ETag",
        REPLAYED,
        "Location",
        "RateLimit",
        "RateLimit-Policy",
        "Repr-Digest",
        "Retry-After",
        "WWW-Authenticate",
        "X-Request-ID",
    ),
}
UPLOADS = frozenset({"/v1/models", "/v1/datasets"})


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application. Its database must be migrated: see `python -m api`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = Services(
            settings=settings,
            database=Database(settings.database_url),
            store=open_store(settings.store_url),
            spool=Spool(settings.data_dir / "spool"),
            celery=make_celery(settings),
            counter=make_counter(settings),
        )
        app.state.services = services
        try:
            yield
        finally:
            if services.counter is not None:
                await services.counter.close()
            services.spool.close()
            services.celery.close()
            services.database.close()

    app = docs.Application(lifespan=lifespan)
    for module in ROUTES:
        app.include_router(module.router)
    install_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_bytes=MAX_JSON_BYTES, exempt=UPLOADS)
    app.add_middleware(Idempotency)
    app.add_middleware(Authorization)
    app.add_middleware(RateLimit)
    app.add_middleware(Authentication, prefix="/v1")
    app.add_middleware(HeadAsGet)
    app.add_middleware(CloseUnread)
    app.add_middleware(RequestLog)
    if settings.cors_origins:
        # Outside of everything else, so that a page may also read what went wrong.
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, **CORS)
    return app
