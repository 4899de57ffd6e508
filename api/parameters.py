"""Query parameters that a route does not know are refused: a cursor that is mistyped would give the
first page again, and a `dry_run` would train."""

from __future__ import annotations

from fastapi import Request
from fastapi.exceptions import RequestValidationError

from api.auth import lies_below

PREFIX = "/v1"
_MAX_NAME = 80  # of a name that is told


async def refuse_unknown_parameters(request: Request) -> None:
    """Of every route below PREFIX; it knows what the OpenAPI document says of it. Probes of
    `/healthz` and the files of `/docs` may have anything in their query.

    RequestValidationError with an entry for each that is not known."""
    if not request.url.query or not lies_below(request.url.path, PREFIX):
        return
    operations = request.app.openapi()["paths"][request.scope["route"].path]
    operation = operations[request.scope["method"].lower()]
    known = sorted(
        parameter["name"]
        for parameter in operation.get("parameters", ())
        if parameter["in"] == "query"
    )
    there_are = f"there are {', '.join(known)}" if known else "there are none"
    faults = [
        {
            "type": "unknown_parameter",
            "loc": ("query", name[:_MAX_NAME]),
            "msg": f"There is no such parameter here; {there_are}.",
        }
        for name in request.query_params
        if name not in known
    ]
    if faults:
        raise RequestValidationError(faults)
