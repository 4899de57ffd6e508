"""Datasets: uploaded, inspected at once, listed."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from sqlalchemy.orm import Session

from api.deps import After, Limit, PrincipalDep, ServicesDep
from api.intake import Intake, Kind
from api.schemas import DatasetOut, Id, Page
from api.upload_routes import add_upload_routes
from jobs import deletion, records, store
from jobs.inspection import DatasetInspection, inspect_dataset_upload

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])
DatasetId = Annotated[Id, Path(examples=["dst_3q2-7wAAQkSgMvUuTqBvxQ"])]


def _add(session: Session, intake: Intake[DatasetInspection]) -> records.Dataset:
    return store.add_dataset(
        session,
        id=intake.id,
        project_id=intake.project_id,
        name=intake.name,
        size_bytes=intake.size_bytes,
        uploads=intake.uploads,
        files=intake.files,
        profile=intake.inspection.profile.model_dump(mode="json"),
        warnings=intake.inspection.warnings,
    )


DATASET = Kind("dataset", "/v1/datasets", inspect_dataset_upload, _add)

add_upload_routes(
    router,
    DATASET,
    DatasetOut,
    description="Files named train, dev, test or unlabelled, each .csv, .tsv, .jsonl or "
    ".parquet, in an archive or single; train is needed. The first line of a .csv or .tsv names "
    "its columns. Broken rows are refused at once, in `rows`, with their line numbers.",
    example="dataset.zip",
)


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


@router.delete(
    "/{dataset_id}",
    status_code=204,
    summary="Delete a dataset",
    description="Refused (409) while a queued or running job has it. Jobs that ended keep its id, "
    "which is 410 from then on.",
    response_class=Response,
)
def delete_dataset(
    dataset_id: DatasetId, services: ServicesDep, principal: PrincipalDep
) -> Response:
    with services.database.transaction() as session:
        deletion.delete_dataset(session, principal.actor, dataset_id)
    return Response(status_code=204)
