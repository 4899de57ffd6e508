"""The audit log of a project, for its admins. It is written where things are done: see
jobs.access.record_action."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from api.deps import After, Limit, PrincipalDep, ServicesDep
from api.schemas import AuditEntryOut, Id, Page
from jobs import access

router = APIRouter(prefix="/v1/audit", tags=["access"])


@router.get(
    "",
    summary="Who did what, newest first",
    description="What was made, changed or deleted: uploads, profiles, jobs, keys, projects, "
    "quotas, webhooks, and workers that were drained. Each is written in the transaction that did "
    "it, and never changed. Keys are named by their ids; where there is none, the service's host "
    "did it.",
)
def list_actions(
    services: ServicesDep,
    principal: PrincipalDep,
    after: After = None,
    limit: Limit = 50,
    key: Annotated[Id | None, Query(description="Only what this key (its id) did.")] = None,
    target: Annotated[Id | None, Query(description="Only what was done to this record.")] = None,
) -> Page[AuditEntryOut]:
    with services.database.reading() as session:
        found = access.list_actions(
            session,
            project_id=principal.project_id,
            after=after,
            limit=limit + 1,
            key_id=key,
            target=target,
        )
    return Page[AuditEntryOut].of(found, limit, AuditEntryOut.of)
