"""Latency profiles of devices: uploaded as JSON, listed, named by constraints."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Query, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from api.deps import After, Limit, PrincipalDep, ServicesDep
from api.schemas import Id, Name, Page, ProfileOut, ProfileSummary, StoredDeviceProfile
from compression.device_profile import DeviceProfile
from jobs import access, deletion, store

router = APIRouter(prefix="/v1/profiles", tags=["profiles"])
ProfileId = Annotated[Id, Path(examples=["prf_3q2-7wAAQkSgMvUuTqBvxQ"])]

_SETTING = {"batch_size": 1, "seq_len": 64, "threads": 1, "format": "onnx"}
_TABLE = {"call": 0.02, "embeddings": 0.2, "pooled_head": 0.05, "token_head": 0.02}
EXAMPLES: dict[str, Any] = {
    "board": {
        "summary": "What `python -m compression profile` wrote on a board",
        "value": {
            "widthwise_profile": 3,
            "device": {
                "cpu": "ARMv8 Processor rev 3 (v8l)",
                "cores": 4,
                "threads": 4,
                "instruction_sets": ["asimd"],
                "memory_bytes": 4_000_000_000,
                "gpus": [],
                "platform": "Linux-6.1-aarch64",
                "python": "3.11.2",
                "libraries": {"onnxruntime": "1.32.0", "numpy": "1.26.4"},
            },
            "shape": {
                "hidden": 384,
                "head_dim": 32,
                "vocab_size": 30522,
                "labels": 2,
                "embedding_size": None,
                "activation": "gelu",
            },
            "layers": 6,
            "rounds": 50,
            "tables": [
                {
                    **_SETTING,
                    **_TABLE,
                    "attention": {"3": 1.9, "12": 5.6},
                    "ffn": {"384": 2.3, "1536": 8.1},
                }
            ],
            "networks": [
                {
                    **_SETTING,
                    "heads": [12, 12, 6, 6, 3, 3],
                    "ffn": [1536, 1536, 768, 768, 384, 384],
                    "measured_ms": 50.1,
                    "served": False,
                }
            ],
        },
    },
}


@router.post(
    "",
    status_code=201,
    summary="Upload a device's profile",
    description="The JSON that `python -m compression profile` writes on a device, as it is. A "
    "constraint then names it in `latency_on`. Nothing that it says of its own error is believed: "
    "that is computed from the whole networks which were timed there.",
)
def upload_profile(
    services: ServicesDep,
    principal: PrincipalDep,
    response: Response,
    body: Annotated[StoredDeviceProfile, Body(openapi_examples=EXAMPLES)],
    name: Annotated[
        Name | None, Query(description="A name to list it by; by default the processor's.")
    ] = None,
) -> ProfileOut:
    found = _validated(body)
    content = found.model_dump(mode="json")
    summary = {
        **{key: content[key] for key in ("device", "shape", "layers")},
        **found.measured,
        "heads": sorted(found.tables[0].attention),
        "ffn": sorted(found.tables[0].ffn),
        "errors": {fmt: each.model_dump(mode="json") for fmt, each in found.errors.items()},
    }
    with services.database.transaction() as session:
        profile = store.add_profile(
            session,
            project_id=principal.project_id,
            name=name or found.device.cpu.strip()[:200] or "profile",
            sha256=found.sha256,
            summary=summary,
            content=content,
        )
        access.record_action(
            session, principal.actor, "profile.uploaded", profile.id, name=profile.name
        )
    response.headers["Location"] = f"/v1/profiles/{profile.id}"
    return ProfileOut.of(profile)


def _validated(body: dict[str, Any]) -> DeviceProfile:
    """In a worker thread, where it holds up nobody: FastAPI's own validation is in the loop."""
    try:
        return DeviceProfile.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(
            [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        ) from None


@router.get("", summary="Profiles, newest first", description="Without their tables.")
def list_profiles(
    services: ServicesDep, principal: PrincipalDep, after: After = None, limit: Limit = 50
) -> Page[ProfileSummary]:
    with services.database.reading() as session:
        found = store.list_profiles(
            session, project_id=principal.project_id, after=after, limit=limit + 1
        )
    return Page[ProfileSummary].of(found, limit, ProfileSummary.of)


@router.get("/{profile_id}", summary="A profile")
def get_profile(
    profile_id: ProfileId, services: ServicesDep, principal: PrincipalDep
) -> ProfileOut:
    with services.database.reading() as session:
        return ProfileOut.of(
            store.get_profile(session, profile_id, project_id=principal.project_id)
        )


@router.delete(
    "/{profile_id}",
    status_code=204,
    summary="Delete a profile",
    description="Refused (409) while a queued or running job names it. Jobs that ended keep what "
    "was predicted with it; to run one of them again, name another profile in a clone.",
    response_class=Response,
)
def delete_profile(
    profile_id: ProfileId, services: ServicesDep, principal: PrincipalDep
) -> Response:
    with services.database.transaction() as session:
        deletion.delete_profile(session, principal.actor, profile_id)
    return Response(status_code=204)
