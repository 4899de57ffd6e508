"""/docs and the OpenAPI document. Swagger UI comes from a package on this host: a service on a
closed network must not ask its readers' browsers to fetch scripts from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, Response

from api.authorization import required_role
from api.errors import PROBLEM_MEDIA_TYPE, ApiError
from api.idempotency import DESCRIPTION as IDEMPOTENCY
from api.idempotency import HEADER as IDEMPOTENCY_KEY
from api.schemas import Problem
from jobs.roles import Role

VERSION = "0.1.0"
DESCRIPTION = """Upload a fine-tuned BERT-family model and its dataset, say how wide its
sub-networks may be or what they must hold, and download verified smaller models with their
measured accuracy, latency and size.

Every request below `/v1` carries `Authorization: Bearer <API key>`; the first key lies in the
file `api_key` of the data folder. A key belongs to a project, sees what is in it and nothing
else, and has a role: a viewer reads, a submitter also uploads, creates and cancels jobs, an admin
also makes and revokes keys, sets up webhooks and reads the audit log. `RateLimit` says how many
requests it has left. Errors are problem+json (RFC 9457). Lists are
read with `?limit=` and `?after=`, the `next` of the page before. A query parameter that is not
listed here is refused (422). Every POST takes an
`Idempotency-Key`, so that it can be sent again when its answer was lost.
"""

router = APIRouter(include_in_schema=False)
_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}
_PROBLEM_CASES = {
    "400": "The request is malformed.",
    "401": "The API key is missing or unknown.",
    "403": "The key's role, or a quota of its project, does not allow this.",
    "404": "There is no such record, or it is another project's.",
    "408": "Nothing of the body came for a while.",
    "409": "The record's state does not allow this, or the first request with this "
    "Idempotency-Key is in progress.",
    "410": "It was deleted, or has expired.",
    "412": "What the request presumes does not hold.",
    "413": "The body is too large.",
    "415": "The body is of a kind that is not read here.",
    "416": "The range lies outside the file.",
    "422": "What was sent is understood, and cannot be used.",
    "423": "Another request writes this.",
    "429": "The key has made all requests that it may make in a minute, or the project has as much "
    "open as it may.",
    "460": "The body is not what its checksum says.",
    "503": "Something the service needs is not there, or it has as much open as it can.",
    "507": "No room left to store this.",
}
_UPLOAD_STATUSES = {
    "options": [],
    "post": ["400", "412", "413", "415", "460"],
    "get": ["410", "412"],
    "patch": ["400", "409", "410", "412", "413", "415", "423", "460"],
    "delete": ["409", "410", "412", "423"],
}

_DELETES_WHAT_MAY_BE_IN_USE = (
    "/v1/models/{model_id}",
    "/v1/datasets/{dataset_id}",
    "/v1/artifacts/{artifact_id}",
    "/v1/profiles/{profile_id}",
    "/v1/jobs/{job_id}",
)
_IDEMPOTENCY_KEY = {
    "name": IDEMPOTENCY_KEY,
    "in": "header",
    "required": False,
    "description": IDEMPOTENCY,
    "schema": {"type": "string", "minLength": 1, "maxLength": 257},
    "example": "8e03978e-40d5-43e8-bc93-6894a57f9324",
}


@router.get("/docs")
def docs_page(request: Request) -> HTMLResponse:
    root = request.scope.get("root_path", "")
    page = get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title="Widthwise",
        swagger_js_url=f"{root}/docs/swagger-ui-bundle.js",
        swagger_css_url=f"{root}/docs/swagger-ui.css",
        swagger_favicon_url=f"{root}/docs/favicon.png",
        swagger_ui_parameters={"persistAuthorization": True, "validatorUrl": None},
    )
    page.headers["Content-Security-Policy"] = _policy(page.body)
    return page


def _policy(page: bytes | memoryview) -> str:
    """Its own files, the one script that stands in it (by its hash), and nothing else."""
    (script,) = re.findall(rb"<script>(.*?)</script>", bytes(page), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    return (
        f"default-src 'none'; script-src 'self' 'sha256-{digest}'; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@router.get("/docs/{name}")
def docs_asset(name: str) -> Response:
    if name not in _ASSETS:
        raise ApiError(404, "not-found", f"There is nothing at /docs/{name}.")
    return FileResponse(
        _asset_folder() / name,
        media_type=_ASSETS[name],
        headers={"Cache-Control": "max-age=86400"},
    )


@cache
def _asset_folder() -> Path:
    """Where the package keeps Swagger UI; its files are used and its code is not imported."""
    spec = find_spec("fastapi_offline")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "static"


class Application(FastAPI):
    """FastAPI with this service's title and an OpenAPI document that tells its errors truly."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            title="Widthwise",
            version=VERSION,
            description=DESCRIPTION,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            **options,
        )

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            _tell_roles_and_problems(document)
            _link_records(document)
            self.openapi_schema = document
        return self.openapi_schema


def _tell_roles_and_problems(document: dict[str, Any]) -> None:
    """Every operation's role, and its errors as problem+json in place of FastAPI's own 422."""
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(problem.pop("$defs", {}))
    schemas["Problem"] = problem
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path.startswith("/v1"):
                role = f"Needs the role `{required_role(method.upper(), path)}`."
                operation["description"] = f"{operation.get('description', '')}\n\n{role}".strip()
            if path.startswith("/v1") and method == "post":
                operation.setdefault("parameters", []).append(_IDEMPOTENCY_KEY)
            for status in _statuses(path, method, operation):
                operation["responses"][status] = {
                    "description": _PROBLEM_CASES[status],
                    "content": {
                        PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}
                    },
                }


def _statuses(path: str, method: str, operation: Mapping[str, Any]) -> list[str]:
    if not path.startswith("/v1"):
        return ["503"] if path == "/readyz" else []
    statuses = {"401", "422", "429", "503"}
    if required_role(method.upper(), path) != Role.VIEWER:
        statuses.add("403")
    if "{" in path:
        statuses.add("404")
    if "requestBody" in operation:
        statuses |= {"400", "408", "413", "415"}
    if method == "post":
        statuses |= {"400", "409"}  # of the Idempotency-Key
    if method not in ("get", "options"):
        statuses.add("507")  # whatever writes may find the database's disk full
    if path.startswith("/v1/uploads") and (path, method) != ("/v1/uploads", "get"):
        statuses |= set(_UPLOAD_STATUSES[method])
    if any(parameter["name"] == "after" for parameter in operation.get("parameters", ())):
        statuses.add("404")  # a cursor of no page
    if path.endswith("/events"):
        statuses.add("400")
    if path.endswith("/content"):
        statuses |= {"412", "416"}
    if "{" in path and path.startswith(("/v1/models", "/v1/datasets", "/v1/artifacts")):
        statuses.add("410")
    if method == "delete" and path in _DELETES_WHAT_MAY_BE_IN_USE:
        statuses.add("409")
    return sorted(statuses)


def _link_records(document: dict[str, Any]) -> None:
    """From an answer that holds the id of a record, or a page of them, to what can be asked of
    it: OpenAPI's links, which clients and tests walk."""
    below: dict[str, list[tuple[str, str]]] = {}  # noun -> operations of one record of it
    for path, operations in document["paths"].items():
        if found := re.fullmatch(r"/v1/([a-z]+)/\{([a-z_]+)\}(/[a-z]+)*", path):
            below.setdefault(found[1], []).extend(
                (operation["operationId"], found[2]) for operation in operations.values()
            )
    holds = {"get": ("items/0/id", ("200",)), "post": ("id", ("201", "202"))}
    for path, operations in document["paths"].items():
        links = below.get(path.rpartition("/")[2], [])
        for method, operation in operations.items():
            where, statuses = holds.get(method, ("", ()))
            for status in statuses:
                if links and status in operation["responses"]:
                    operation["responses"][status]["links"] = {
                        name: {
                            "operationId": name,
                            "parameters": {parameter: f"$response.body#/{where}"},
                        }
                        for name, parameter in links
                    }
