"""Quotas of a project and what it has of them; what the retention period would delete."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Body, Query

from api.auth import Principal
from api.deps import Limit, PrincipalDep, ServicesDep
from api.projects import ProjectId, require_operator
from api.schemas import QuotasIn, QuotasOut, RetentionOut
from jobs import access, deletion, quotas, records
from jobs.errors import NotFound

router = APIRouter(prefix="/v1", tags=["access"])


@router.get("/projects/{project_id}/quotas", summary="A project's quotas, and its use of them")
def get_quotas(project_id: ProjectId, services: ServicesDep, principal: PrincipalDep) -> QuotasOut:
    _require_sight(principal, project_id)
    with services.database.reading() as session:
        project = access.get_project(session, project_id)
        return _told(project, quotas.usage(session, project_id))


@router.put(
    "/projects/{project_id}/quotas",
    summary="Set a project's quotas",
    description="All of them: one that is left out or null bounds nothing. For an admin of the "
    "installation's first project. What is there already stays, even above a new quota.",
)
def set_quotas(
    project_id: ProjectId,
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[QuotasIn, Body()],
) -> QuotasOut:
    _require_sight(principal, project_id)
    require_operator(principal, "Quotas are set")
    changes = body.model_dump()
    with services.database.transaction() as session:
        project = access.get_project(session, project_id)
        quotas.set_quotas(project, changes)
        access.record_action(session, principal.actor, "quotas.changed", project_id, **changes)
        return _told(project, quotas.usage(session, project_id))


@router.get(
    "/retention",
    summary="What the retention period would delete now",
    description="Artifacts of jobs that ended, and models and datasets that no job had, before the "
    "last `days`; by default those of the installation's setting. Nothing is deleted.",
)
def list_past_retention(
    services: ServicesDep,
    principal: PrincipalDep,
    days: Annotated[float | None, Query(ge=0, le=36_500)] = None,
    limit: Limit = 50,
) -> RetentionOut:
    if days is None:
        days = services.settings.retention_days or None
    found = []
    if days is not None:
        with services.database.reading() as session:
            found = deletion.past_retention(
                session, days=days, project_id=principal.project_id, limit=limit
            )
    return RetentionOut.of(found, days=days)


def _require_sight(principal: Principal, project_id: str) -> None:
    if project_id != principal.project_id and not principal.is_operator:
        raise NotFound("project", project_id)


def _told(project: records.Project, used: quotas.Usage) -> QuotasOut:
    return QuotasOut(limits=asdict(quotas.Quotas.of(project)), used=asdict(used))
