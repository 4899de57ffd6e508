"""Models: uploaded, inspected at once, listed."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from sqlalchemy.orm import Session

from api.deps import After, Limit, PrincipalDep, ServicesDep
from api.intake import Intake, Kind
from api.schemas import Id, ModelOut, Page
from api.upload_routes import add_upload_routes
from jobs import deletion, records, store
from jobs.inspection import ModelInspection, inspect_model_upload

router = APIRouter(prefix="/v1/models", tags=["models"])
ModelId = Annotated[Id, Path(examples=["mdl_3q2-7wAAQkSgMvUuTqBvxQ"])]


def _add(session: Session, intake: Intake[ModelInspection]) -> records.Model:
    return store.add_model(
        session,
        id=intake.id,
        project_id=intake.project_id,
        name=intake.name,
        size_bytes=intake.size_bytes,
        uploads=intake.uploads,
        files=intake.files,
        info=intake.inspection.info.model_dump(mode="json"),
        warnings=intake.inspection.warnings,
    )


MODEL = Kind("model", "/v1/models", inspect_model_upload, _add)

add_upload_routes(
    router,
    MODEL,
    ModelOut,
    description="A folder as .tar.gz, .tgz, .tar or .zip, or its single files. Hugging Face "
    "(config.json, model.safetensors or pytorch_model.bin, vocab.txt or tokenizer.json) and "
    "PaddleNLP (config.json or model_config.json, model_state.pdparams or model.safetensors) "
    "layouts are read. The answer comes after the inspection: family, layers, heads, the widths "
    "that leave whole heads and neurons, labels.",
    example="model.tar.gz",
)


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


@router.delete(
    "/{model_id}",
    status_code=204,
    summary="Delete a model",
    description="Refused (409) while a queued or running job has it. Jobs that ended keep its id, "
    "which is 410 from then on.",
    response_class=Response,
)
def delete_model(model_id: ModelId, services: ServicesDep, principal: PrincipalDep) -> Response:
    with services.database.transaction() as session:
        deletion.delete_model(session, principal.actor, model_id)
    return Response(status_code=204)
