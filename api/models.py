"""Models: uploaded, inspected at once, listed."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from sqlalchemy.orm import Session

from api.deps import After, Limit, PrincipalDep, ServicesDep
from api.schemas import Id, ModelOut, Page
from api.uploads import FilenameQuery, Intake, NameQuery, default_name, take_in, upload_openapi
from jobs import access, records, store
from jobs.artifacts import model_key
from jobs.inspection import ModelInspection, inspect_model_upload
from jobs.records import new_id

router = APIRouter(prefix="/v1/models", tags=["models"])
ModelId = Annotated[Id, Path(examples=["mdl_3q2-7wAAQkSgMvUuTqBvxQ"])]


_UPLOAD: dict[str, Any] = {
    "status_code": 201,
    "summary": "Upload a model",
    "description": "A folder as .tar.gz, .tgz, .tar or .zip, or its single files. Hugging Face "
    "(config.json, model.safetensors or pytorch_model.bin, vocab.txt or tokenizer.json) and "
    "PaddleNLP (config.json or model_config.json, model_state.pdparams or model.safetensors) "
    "layouts are read. The answer comes after the inspection: family, layers, heads, the widths "
    "that leave whole heads and neurons, labels.",
    "openapi_extra": upload_openapi("model.tar.gz"),
}


@router.put("", **_UPLOAD)  # which `curl -T` sends
@router.post("", **_UPLOAD)
async def upload_model(
    request: Request,
    response: Response,
    services: ServicesDep,
    principal: PrincipalDep,
    filename: FilenameQuery = None,
    name: NameQuery = None,
) -> ModelOut:
    model_id = new_id("model")

    def record(session: Session, intake: Intake[ModelInspection]) -> records.Model:
        model = store.add_model(
            session,
            id=model_id,
            project_id=principal.project_id,
            name=name or default_name(intake.uploads, "model"),
            size_bytes=intake.size_bytes,
            uploads=intake.uploads,
            files=intake.files,
            info=intake.inspection.info.model_dump(mode="json"),
            warnings=intake.inspection.warnings,
        )
        access.record_action(session, principal.actor, "model.uploaded", model.id, name=model.name)
        return model

    model = await take_in(
        request,
        services,
        filename=filename,
        inspect=inspect_model_upload,
        key=lambda file: model_key(model_id, file),
        record=record,
    )
    response.headers["Location"] = f"/v1/models/{model_id}"
    return ModelOut.of(model)


@router.get("", summary="Models, newest first")
def list_models(
    services: ServicesDep, principal: PrincipalDep, after: After = None, limit: Limit = 50
) -> Page[ModelOut]:
    with services.database.reading() as session:
        found = store.list_models(
            session, project_id=principal.project_id, after=after, limit=limit + 1
        )
    return Page[ModelOut].of(found, limit, ModelOut.of)


@router.get("/{model_id}", summary="A model")
def get_model(model_id: ModelId, services: ServicesDep, principal: PrincipalDep) -> ModelOut:
    with services.database.reading() as session:
        return ModelOut.of(store.get_model(session, model_id, project_id=principal.project_id))
