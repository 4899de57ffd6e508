"""The routes of plain uploads, of which each kind has the same two."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from api.deps import PrincipalDep, ServicesDep
from api.intake import Kind, upload
from api.schemas import DatasetOut, ModelOut, Name

FilenameQuery = Annotated[
    str | None,
    Query(description="Name of the file in a raw body; multipart parts carry their own."),
]
NameQuery = Annotated[
    Name | None, Query(description="A name to list it by; by default the file's.")
]


def _body_openapi(example: str) -> dict[str, Any]:
    """FastAPI does not read the body and so cannot know it."""
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/octet-stream": {
                    "schema": {
                        "type": "string",
                        "format": "binary",
                        "description": f"One file; name it with ?filename={example}.",
                    },
                },
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file"],
                        "properties": {
                            "file": {
                                "type": "array",
                                "items": {"type": "string", "format": "binary"},
                                "description": "An archive, or the single files of one folder.",
                            }
                        },
                    }
                },
            },
        }
    }


def add_upload_routes(
    router: APIRouter,
    kind: Kind[Any, Any],
    shown: type[ModelOut] | type[DatasetOut],
    *,
    description: str,
    example: str,
) -> None:
    """POST, and PUT, which `curl -T` sends, of what becomes a record of this kind."""

    async def receive(
        request: Request,
        response: Response,
        services: ServicesDep,
        principal: PrincipalDep,
        filename: FilenameQuery = None,
        name: NameQuery = None,
    ) -> Any:
        record = await upload(
            request, services, principal.actor, kind, filename=filename, name=name
        )
        response.headers["Location"] = f"{kind.path}/{record.id}"
        return shown.of(record)

    for method in ("PUT", "POST"):
        router.add_api_route(
            "",
            receive,
            methods=[method],
            name=f"upload_{kind.word}",
            response_model=shown,
            status_code=201,
            summary=f"Upload a {kind.word}",
            description=description,
            openapi_extra=_body_openapi(example),
        )
