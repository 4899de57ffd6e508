"""What the routes need, opened once for each process and handed to them by FastAPI."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Annotated

import anyio
from celery import Celery
from fastapi import Depends, Path, Query, Request, Security
from fastapi.security import HTTPBearer

from api.auth import Principal
from api.gathering import Gathering
from api.limits import Counter
from api.live import LiveEvents
from api.metrics import ApiMetrics
from api.schemas import Id
from api.spool import Spool
from jobs.artifacts import ObjectStore
from jobs.db import Database
from jobs.settings import Settings
from jobs.webhook_targets import Resolver, resolve

MAX_PAGE = 200


@dataclass(frozen=True)
class Services:
    """`inspections` keeps uploads in inspection from taking every worker thread, `storing` keeps
    those from it who wait for the object store, `lookups` those who wait for a name's addresses;
    `counter` counts the requests of each key, where they are limited;
    `live` tells watchers what happens;
    `metrics` counts for Prometheus;
    `resolver` tells the addresses of webhooks' hosts;
    `stopping` is set when the server shuts down, so that endless streams end."""

    settings: Settings
    database: Database
    store: ObjectStore
    spool: Spool
    gathering: Gathering
    celery: Celery
    counter: Counter | None
    live: LiveEvents
    metrics: ApiMetrics
    stopping: asyncio.Event
    resolver: Resolver = resolve
    inspections: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(4))
    storing: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(16))
    lookups: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(8))


def get_services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


# The middleware has checked the key already; this shows the scheme in the OpenAPI document.
_bearer = HTTPBearer(
    auto_error=False, scheme_name="API key", description="An API key: `wwk_` and 43 characters."
)


def get_principal(request: Request, _: Annotated[object, Security(_bearer)]) -> Principal:
    principal = request.state.principal
    assert isinstance(principal, Principal)
    return principal


ServicesDep = Annotated[Services, Depends(get_services)]
PrincipalDep = Annotated[Principal, Depends(get_principal)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Items a page, at most.")]
After = Annotated[
    Id | None, Query(description="The cursor `next` of the page before; leave out at first.")
]
JobId = Annotated[Id, Path(examples=["job_3q2-7wAAQkSgMvUuTqBvxQ"])]
