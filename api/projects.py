"""Projects: whose records are whose. And who a key is."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Path, Response

from api.auth import Principal
from api.deps import After, Limit, PrincipalDep, ServicesDep
from api.errors import ApiError
from api.schemas import Id, KeyCreated, MeOut, Page, ProjectCreated, ProjectIn, ProjectOut
from jobs import access
from jobs.access import hash_key, new_key
from jobs.errors import NotFound
from jobs.roles import Role

router = APIRouter(prefix="/v1", tags=["access"])
ProjectId = Annotated[Id, Path(examples=["prj_3q2-7wAAQkSgMvUuTqBvxQ"])]


@router.get(
    "/me",
    summary="Who this API key is",
    description="Its id, role and end, and its project: what a portal needs to know what to offer.",
)
def get_me(services: ServicesDep, principal: PrincipalDep) -> MeOut:
    with services.database.reading() as session:
        project = access.get_project(session, principal.project_id)
    return MeOut(
        key=principal.key_id,
        name=principal.key_name,
        role=principal.role,
        expires_at=principal.expires_at,
        project=ProjectOut.of(project),
        is_operator=principal.is_operator,
    )


@router.get(
    "/projects",
    summary="Projects, newest first",
    description="The key's own; all of them for an admin of the installation's first project.",
)
def list_projects(
    services: ServicesDep, principal: PrincipalDep, after: After = None, limit: Limit = 50
) -> Page[ProjectOut]:
    with services.database.reading() as session:
        if principal.is_operator:
            found = access.list_projects(session, after=after, limit=limit + 1)
        else:
            found = [access.get_project(session, principal.project_id)] if after is None else []
    return Page[ProjectOut].of(found, limit, ProjectOut.of)


@router.get("/projects/{project_id}", summary="A project")
def get_project(
    project_id: ProjectId, services: ServicesDep, principal: PrincipalDep
) -> ProjectOut:
    if project_id != principal.project_id and not principal.is_operator:
        raise NotFound("project", project_id)
    with services.database.reading() as session:
        return ProjectOut.of(access.get_project(session, project_id))


@router.post(
    "/projects",
    status_code=201,
    summary="Create a project",
    description="With its first API key, an admin's, which is shown in this answer and never "
    "again. For an admin of the installation's first project, who cannot read what the new "
    "project will hold; its own admin makes its other keys.",
)
def create_project(
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[ProjectIn, Body()],
    response: Response,
) -> ProjectCreated:
    require_operator(principal, "Projects are made")
    key = new_key()
    with services.database.transaction() as session:
        project = access.add_project(session, name=body.name)
        record = access.add_api_key(
            session,
            project_id=project.id,
            name="first key",
            hash=hash_key(key),
            role=Role.ADMIN,
        )
        access.record_action(
            session,
            principal.actor,
            "project.created",
            project.id,
            name=project.name,
            key=record.id,
        )
    response.headers["Location"] = f"/v1/projects/{project.id}"
    response.headers["Cache-Control"] = "no-store"
    return ProjectCreated.with_key(project, KeyCreated.shown_once(record, key))


def require_operator(principal: Principal, what_is_done: str) -> None:
    if not principal.is_operator:
        raise ApiError(
            403,
            "operator-only",
            f"{what_is_done} by an admin of the installation's first project, or from the command "
            "line of its host.",
            title="Only the installation's operator may do this",
        )
