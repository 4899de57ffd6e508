"""Every error as RFC 9457 problem+json: the one place where meanings become statuses.

`type` is a stable URN, `instance` the path that was asked for. Extension members:
`errors` (one entry a fault, with a JSON `pointer` into the request body, or the
`parameter` or `header` to blame), `pointer` (that of the first fault, or the name of
the uploaded file to blame) and `rows` (broken rows of a dataset, lines from 1).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from compression.errors import CompressionError, without_consequences
from jobs.db import is_away, is_full
from jobs.errors import (
    Conflict,
    Gone,
    JobsError,
    NotFound,
    QuotaExceeded,
    StoreFull,
    StoreRefused,
    StoreUnreachable,
    UploadRejected,
)
from jobs.webhook_targets import TargetRefused, TargetUnknown

PROBLEM_MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:widthwise:problem:"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
MAX_ENTRIES = 100  # of `errors` and of `rows`: enough to mend, and bounded

# What the domain raises, most particular first. An error absent here is a fault of ours: 500.
_DOMAIN: tuple[tuple[type[Exception], int, str], ...] = (
    (Gone, 410, "It is no longer there"),
    (NotFound, 404, "Not found"),
    (QuotaExceeded, 403, "The project has reached its quota"),
    (Conflict, 409, "The record's state does not allow this"),
    (UploadRejected, 422, "The upload cannot be used"),
    (TargetRefused, 422, "The webhook cannot be called there"),
    (TargetUnknown, 422, "The webhook cannot be called there"),
    (StoreFull, 507, "No room left to store this"),
    (StoreRefused, 507, "This could not be stored"),
    (CompressionError, 422, "The job cannot run as asked"),
)

# What a request may have to go without: status, type, title and detail of the answer.
_WITHOUT = {
    "room": (
        507,
        StoreFull.code,
        "No room left to store this",
        "A disk that the service writes on, or its database, has no room left.",
    ),
    "database": (
        503,
        "database-unreachable",
        "The service has no database",
        "The service cannot reach its database, or that takes nothing just now; ask again.",
    ),
    "store": (
        503,
        StoreUnreachable.code,
        "The service has no object store",
        "The service cannot reach its object store, or that does not answer as it should; ask "
        "again.",
    ),
}


class ApiError(Exception):
    """An error of the HTTP edge itself; the domain raises its own."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        title: str | None = None,
        pointer: str | None = None,
        headers: Mapping[str, str] | None = None,
        **extensions: Any,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.title = title or code.replace("-", " ").capitalize()
        self.pointer = pointer
        self.headers = dict(headers or {})
        self.extensions = extensions


# RFC 9110's words where Python's, and so the type of a problem, change between versions.
_PHRASES = {413: "Content Too Large", 416: "Range Not Satisfiable", 422: "Unprocessable Content"}


def _phrase(status: int) -> str:
    return _PHRASES.get(status) or HTTPStatus(status).phrase


def problem(
    scope: Scope,
    status: int,
    code: str,
    title: str,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    pointer: str | None = None,
    **extensions: Any,
) -> JSONResponse:
    """A problem+json response; extension members that are None are left out."""
    body: dict[str, Any] = {
        "type": TYPE_PREFIX + code,
        "title": title,
        "status": status,
        "detail": detail,
        "instance": scope.get("root_path", "") + scope["path"],
        "pointer": pointer,
        **extensions,
    }
    if pointer is not None and pointer.startswith("/") and "errors" not in extensions:
        body["errors"] = [{"detail": detail, "pointer": pointer}]
    request_id = scope.get("state", {}).get("request_id")
    if status >= 500 and request_id is not None:
        body["request_id"] = request_id  # by which an operator finds the log line
    return JSONResponse(
        {key: value for key, value in body.items() if value is not None},
        status_code=status,
        headers=dict(headers or {}),
        media_type=PROBLEM_MEDIA_TYPE,
    )


def api_problem(scope: Scope, error: ApiError) -> JSONResponse:
    return problem(
        scope,
        error.status,
        error.code,
        error.title,
        error.detail,
        headers=error.headers,
        pointer=error.pointer,
        **error.extensions,
    )


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return api_problem(request.scope, error)


async def _on_domain_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, JobsError | CompressionError)
    if isinstance(error, UploadRejected):
        request.app.state.services.metrics.upload_refused(error.code)
    return problem(request.scope, **domain_problem(error))


def domain_problem(error: JobsError | CompressionError) -> dict[str, Any]:
    """What `problem` takes, of a meaning that has a status; else it is a fault of ours, which
    RequestLog logs and answers."""
    meaning = next((entry for entry in _DOMAIN if isinstance(error, entry[0])), None)
    if meaning is None:
        raise error
    _, status, title = meaning
    told: dict[str, Any] = {
        "status": status,
        "code": error.code,
        "title": title,
        "detail": error.message,
        "pointer": getattr(error, "pointer", None),
    }
    rows = getattr(error, "rows", ())[:MAX_ENTRIES]
    if rows:
        told["rows"] = [
            {"file": row.file, "line": row.line, "message": row.message} for row in rows
        ]
    if isinstance(error, QuotaExceeded):
        told |= {"quota": error.quota, "limit": error.limit, "used": error.used}
        if error.quota == "bytes":
            told["status"] = 507
    return told


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What Starlette and FastAPI raise: unknown paths, methods, sizes."""
    assert isinstance(error, HTTPException)
    phrase = _phrase(error.status_code)
    code = re.sub(r"[^a-z]+", "-", phrase.lower()).strip("-")
    detail: str | None = error.detail
    headers = dict(error.headers or {})
    if error.status_code == 404:
        detail = f"There is nothing at {request.scope['path']}."
    elif error.status_code == 405:
        allowed = _allowed_methods(request)
        headers["Allow"] = allowed
        detail = f"{request.method} is not allowed here; allowed: {allowed}."
    return problem(
        request.scope,
        error.status_code,
        code,
        phrase,
        detail or f"{phrase}.",
        headers=headers,
    )


def _allowed_methods(request: Request) -> str:
    """Of all routes at this path; Starlette names those of the first one alone."""
    allowed = set()
    for method in ("DELETE", "GET", "PATCH", "POST", "PUT"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            allowed.add(method)
    if "GET" in allowed:
        allowed.add("HEAD")
    return ", ".join(sorted(allowed))


def json_pointer(parts: Sequence[str | int]) -> str:
    """RFC 6901: ("spec", "a/b", 2) -> "/spec/a~1b/2"."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def _entry(error: Mapping[str, Any]) -> dict[str, str]:
    where, *rest = error["loc"]
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = f"There is no field {str(rest[-1])!r} here."
    elif error["type"] == "missing":
        message = "This is missing."
    elif error["type"] in ("model_attributes_type", "model_type"):
        message = "This must be a JSON object."
    if where == "body":
        return {"detail": message, "pointer": json_pointer(rest)}
    kind = {"query": "parameter", "path": "parameter"}.get(str(where), str(where))
    return {"detail": message, kind: ".".join(str(part) for part in rest)}


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = without_consequences(error.errors())
    if any(fault["type"] == "json_invalid" for fault in faults):
        reason = faults[0].get("ctx", {}).get("error", "")
        return problem(
            request.scope,
            400,
            "malformed-json",
            "The body is not JSON",
            f"The body is not valid JSON at character {faults[0]['loc'][-1]}: {reason}.",
        )
    whole_body = any(fault["loc"] == ("body",) for fault in faults)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if whole_body and media_type != "application/json" and not media_type.endswith("+json"):
        return problem(
            request.scope,
            415,
            "unsupported-media-type",
            "Unsupported media type",
            "Send the body as JSON, with the header Content-Type: application/json.",
        )
    entries = [_entry(fault) for fault in faults[:MAX_ENTRIES]]
    first = entries[0]
    where = first.get("pointer") or first.get("parameter") or first.get("header") or "the body"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return problem(
        request.scope,
        422,
        "invalid-request",
        "The request is not valid",
        f"{where}: {first['detail']}{more}",
        pointer=first.get("pointer"),
        errors=entries,
    )


def fault(scope: Scope) -> JSONResponse:
    """The answer to a fault of ours: the log has the traceback, the answer has not."""
    return problem(
        scope,
        500,
        "internal-error",
        "Internal error",
        "The service failed on this request; its log says why.",
    )


def went_without(error: BaseException | None) -> tuple[str, str] | None:
    """What a request went without ("room", "database", "store"), and why; None where the fault is
    ours. Every write to a disk may find no room, so it is told here and not around each of them."""
    while error is not None:
        if is_full(error) or (isinstance(error, OSError) and error.errno in _NO_ROOM):
            return "room", str(getattr(error, "orig", error))
        if is_away(error):
            return "database", str(getattr(error, "orig", error))
        if isinstance(error, StoreUnreachable):
            return "store", error.reason
        error = error.__cause__  # what Starlette says of one that comes in mid-answer
    return None


def without(what: str, scope: Scope) -> JSONResponse:
    """The answer while a server is away or a disk is full, which no request is to blame for."""
    status, code, title, detail = _WITHOUT[what]
    # A server may be back soon; for room somebody has to do something.
    headers = {"Retry-After": "5"} if status == 503 else {}
    return problem(scope, status, code, title, detail, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(JobsError, _on_domain_error)
    app.add_exception_handler(CompressionError, _on_domain_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
