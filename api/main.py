"""create_app: wiring only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
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
    profiles,
    projects,
    quotas,
    selection,
    tus,
    webhooks,
    workers,
)
from api import jobs as jobs_routes
from api.auth import Authentication, lies_below
from api.authorization import Authorization
from api.deps import Services
from api.errors import install_error_handlers
from api.gathering import Gathering
from api.idempotency import HEADER as IDEMPOTENCY_KEY
from api.idempotency import REPLAYED, Idempotency
from api.limits import RateLimit, make_counter
from api.live import LiveEvents
from api.metrics import ApiMetrics, Measure
from api.middleware import (
    BodyLimit,
    BodyTimeout,
    CloseUnread,
    HeadAsGet,
    RequestLog,
    SecurityHeaders,
)
from api.parameters import refuse_unknown_parameters
from api.spool import Spool
from jobs.artifacts import open_store
from jobs.db import Database
from jobs.metrics import MetricsServer
from jobs.nudges import EventPublisher, Notes, Teller
from jobs.queue import enqueue_delivery, enqueue_job, make_celery
from jobs.settings import Settings

MAX_JSON_BYTES = 1 << 20
STORE_PATIENCE_SECONDS = 10  # somebody waits for the answer
ROUTES = (
    models,
    datasets,
    profiles,
    tus,
    jobs_routes,
    selection,
    events,
    artifacts,
    workers,
    projects,
    quotas,
    keys,
    webhooks,
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
        "Tus-Resumable",
        "Upload-Checksum",
        "Upload-Length",
        "Upload-Metadata",
        "Upload-Offset",
        "X-HTTP-Method-Override",
        "X-Request-ID",
        "X-Requested-With",
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
        "Tus-Checksum-Algorithm",
        "Tus-Extension",
        "Tus-Max-Size",
        "Tus-Resumable",
        "Tus-Version",
        "Upload-Expires",
        "Upload-Length",
        "Upload-Metadata",
        "Upload-Offset",
        "WWW-Authenticate",
        "X-Request-ID",
    ),
}


def _takes_uploads(path: str) -> bool:
    return path.rstrip("/") in ("/v1/models", "/v1/datasets") or lies_below(path, tus.PREFIX)


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application. Its database must be migrated: see `python -m api`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        celery = make_celery(settings)
        publisher = None if settings.redis_url is None else EventPublisher(settings.redis_url)

        def tell_workers(notes: Notes) -> None:
            for job_id, device in notes.queued:
                enqueue_job(celery, job_id, device)
            for delivery_id in notes.deliveries:
                enqueue_delivery(celery, delivery_id)

        teller = Teller(*filter(None, [publisher]), tell_workers)
        database = Database(settings.database_url, after_commit=teller)
        stopping = asyncio.Event()
        live = LiveEvents(settings, database, stopping)
        metrics = ApiMetrics(database, live)
        services = Services(
            settings=settings,
            database=database,
            store=open_store(
                settings.store_url,
                patience_seconds=STORE_PATIENCE_SECONDS,
                **settings.s3_credentials,
            ),
            spool=Spool(settings.data_dir / "spool"),
            gathering=Gathering(settings.data_dir),
            celery=celery,
            counter=make_counter(settings),
            live=live,
            metrics=metrics,
            stopping=stopping,
        )
        app.state.services = services
        live.start()
        metrics_server = MetricsServer(
            metrics.registry, host=settings.metrics_host, port=settings.api_metrics_port
        )
        sweeping = asyncio.create_task(tus.sweep(services))
        try:
            yield
        finally:
            sweeping.cancel()
            await asyncio.wait([sweeping])
            metrics_server.close()
            await live.close()
            if services.counter is not None:
                await services.counter.close()
            services.spool.close()
            teller.close()
            if publisher is not None:
                publisher.close()
            services.celery.close()
            services.database.close()

    app = docs.Application(lifespan=lifespan, dependencies=[Depends(refuse_unknown_parameters)])
    for module in ROUTES:
        app.include_router(module.router)
    install_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_bytes=MAX_JSON_BYTES, exempt=_takes_uploads)
    app.add_middleware(BodyTimeout, seconds=settings.body_timeout_seconds)
    app.add_middleware(Idempotency)
    app.add_middleware(Authorization)
    app.add_middleware(RateLimit)
    app.add_middleware(Authentication, prefix="/v1")
    app.add_middleware(tus.Protocol)
    app.add_middleware(HeadAsGet)
    app.add_middleware(CloseUnread)
    app.add_middleware(RequestLog)
    app.add_middleware(Measure)
    if settings.cors_origins:
        # Outside of everything else, so that a page may also read what went wrong.
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, **CORS)
    app.add_middleware(SecurityHeaders, hsts_seconds=settings.hsts_seconds)
    return app
