"""Which role a request needs: one table for all routes, held to every route by a test."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from api.auth import Principal, lies_below
from api.errors import ApiError, api_problem
from jobs.roles import Role

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
# Webhooks send what happens here to elsewhere, and their URLs may themselves be secrets.
_ADMINISTRATION = ("/v1/keys", "/v1/audit", "/v1/webhooks")
_OPERATION = ("/v1/projects", "/v1/workers")  # which everybody may look at
_SELECTION = re.compile(r"/v1/jobs/[^/]+/selection")


def required_role(method: str, path: str) -> Role:
    """Reading is for viewers, everything else for submitters, unless it says otherwise here: a
    new route that is forgotten here is closed to those who may only read."""
    if any(lies_below(path, prefix) for prefix in _ADMINISTRATION):
        return Role.ADMIN
    if method in _READS:
        return Role.VIEWER
    if any(lies_below(path, prefix) for prefix in _OPERATION):
        return Role.ADMIN
    if _SELECTION.fullmatch(path):  # it answers from what is stored, and stores nothing
        return Role.VIEWER
    return Role.SUBMITTER


class Authorization:
    """403 where the principal's role does not suffice, before anything of the body is read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        principal: Principal | None = scope.get("state", {}).get("principal")
        if scope["type"] == "http" and principal is not None:
            needed = required_role(scope["method"], scope["path"])
            if not principal.role.includes(needed):
                answer = api_problem(scope, _refusal(principal.role, needed))
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _refusal(role: Role, needed: Role) -> ApiError:
    return ApiError(
        403,
        "role-insufficient",
        f"This needs an API key with the role {needed}; the role of yours is {role}.",
        title="The key's role does not allow this",
        headers={"WWW-Authenticate": 'Bearer realm="widthwise", error="insufficient_scope"'},
    )
