"""Datasets: uploaded, inspected at once, listed."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from sqlalchemy.orm import Session

from api.deps import After, Limit, PrincipalDep, ServicesDep
from api.schemas import DatasetOut, Id, Page
from api.uploads import FilenameQuery, Intake, NameQuery, default_name, take_in, upload_openapi
from jobs import access, records, store
from jobs.artifacts import dataset_key
from jobs.inspection import DatasetInspection, inspect_dataset_upload
from jobs.records import new_id

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])
DatasetId = Annotated[Id, Path(examples=["dst_3q2-7wAAQkSgMvUuTqBvxQ"])]


_UPLOAD: dict[str, Any] = {
    "status_code": 201,
    "summary": "Upload a dataset",
    "description": "Files named train, dev, test or unlabelled, each .csv, .tsv, .jsonl or "
    ".parquet, in an archive or single; train is needed. The first line of a .csv or .tsv names "
    "its columns. Broken rows are refused at once, in `rows`, with their line numbers.",
    "openapi_extra": upload_openapi("dataset.zip"),
}


@router.put("", **_UPLOAD)  # which `curl -T` sends
@router.post("", **_UPLOAD)
async def upload_dataset(
    request: Request,
    response: Response,
    services: ServicesDep,
    principal: PrincipalDep,
    filename: FilenameQuery = None,
    name: NameQuery = None,
) -> DatasetOut:
    dataset_id = new_id("dataset")

    def record(session: Session, intake: Intake[DatasetInspection]) -> records.Dataset:
        dataset = store.add_dataset(
            session,
            id=dataset_id,
            project_id=principal.project_id,
            name=name or default_name(intake.uploads, "dataset"),
            size_bytes=intake.size_bytes,
            uploads=intake.uploads,
            files=intake.files,
            profile=intake.inspection.profile.model_dump(mode="json"),
            warnings=intake.inspection.warnings,
        )
        access.record_action(
            session, principal.actor, "dataset.uploaded", dataset.id, name=dataset.name
        )
        return dataset

    dataset = await take_in(
        request,
        services,
        filename=filename,
        inspect=inspect_dataset_upload,
        key=lambda file: dataset_key(dataset_id, file),
        record=record,
    )
    response.headers["Location"] = f"/v1/datasets/{dataset_id}"
    return DatasetOut.of(dataset)


@router.get("", summary="Datasets, newest first")
def list_datasets(
    services: ServicesDep, principal: PrincipalDep, after: After = None, limit: Limit = 50
) -> Page[DatasetOut]:
    with services.database.reading() as session:
        found = store.list_datasets(
            session, project_id=principal.project_id, after=after, limit=limit + 1
        )
    return Page[DatasetOut].of(found, limit, DatasetOut.of)


@router.get("/{dataset_id}", summary="A dataset")
def get_dataset(
    dataset_id: DatasetId, services: ServicesDep, principal: PrincipalDep
) -> DatasetOut:
    with services.database.reading() as session:
        return DatasetOut.of(
            store.get_dataset(session, dataset_id, project_id=principal.project_id)
        )
