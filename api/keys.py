"""API keys: made, listed and revoked by the admins of their project."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Response

from api.deps import After, Limit, PrincipalDep, ServicesDep
from api.errors import ApiError
from api.schemas import Id, KeyCreated, KeyIn, KeyOut, Page
from jobs import access
from jobs.access import hash_key, new_key
from jobs.db import now

router = APIRouter(prefix="/v1/keys", tags=["access"])
KeyId = Annotated[Id, Path(examples=["key_3q2-7wAAQkSgMvUuTqBvxQ"])]

EXAMPLES: dict[str, Any] = {
    "pipeline": {
        "summary": "For a pipeline that submits jobs",
        "value": {"name": "CI of the search team", "role": "submitter"},
    },
    "guest": {
        "summary": "To look at results, until the year's end",
        "value": {"name": "audit", "role": "viewer", "expires_at": "2099-12-31T23:59:59Z"},
    },
}


@router.post(
    "",
    status_code=201,
    summary="Create an API key",
    description="In the project of the key that asks. `key` is shown in this answer and never "
    "again: the service keeps its hash alone.",
)
def create_key(
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[KeyIn, Body(openapi_examples=EXAMPLES)],
    response: Response,
) -> KeyCreated:
    key = new_key()
    with services.database.transaction() as session:
        if body.expires_at is not None and body.expires_at <= now(session):
            raise ApiError(
                422,
                "invalid-request",
                "A key that has expired already would open nothing.",
                title="The request is not valid",
                pointer="/expires_at",
            )
        record = access.add_api_key(
            session,
            project_id=principal.project_id,
            name=body.name,
            hash=hash_key(key),
            role=body.role,
            expires_at=body.expires_at,
        )
        access.record_action(
            session, principal.actor, "key.created", record.id, name=body.name, role=body.role
        )
    response.headers["Location"] = f"/v1/keys/{record.id}"
    response.headers["Cache-Control"] = "no-store"
    return KeyCreated.shown_once(record, key)


@router.get("", summary="API keys, newest first", description="The revoked and expired ones too.")
def list_keys(
    services: ServicesDep, principal: PrincipalDep, after: After = None, limit: Limit = 50
) -> Page[KeyOut]:
    with services.database.reading() as session:
        found = access.list_api_keys(
            session, project_id=principal.project_id, after=after, limit=limit + 1
        )
    return Page[KeyOut].of(found, limit, KeyOut.of)


@router.get("/{key_id}", summary="An API key's record")
def get_key(key_id: KeyId, services: ServicesDep, principal: PrincipalDep) -> KeyOut:
    with services.database.reading() as session:
        return KeyOut.of(access.get_api_key(session, key_id, project_id=principal.project_id))


@router.post(
    "/{key_id}/revoke",
    summary="Revoke an API key",
    description="It opens nothing from this answer on, and event streams that it opened end "
    "within a second. Asking again changes nothing. A project that has revoked its last admin's "
    "key gets a new one with `python -m jobs.keys` on the service's host.",
)
def revoke_key(key_id: KeyId, services: ServicesDep, principal: PrincipalDep) -> KeyOut:
    with services.database.transaction() as session:
        key, changed = access.revoke_api_key(session, key_id, project_id=principal.project_id)
        if changed:
            access.record_action(session, principal.actor, "key.revoked", key.id)
        return KeyOut.of(key)
