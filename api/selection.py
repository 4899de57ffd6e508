"""New constraints on a finished job, answered from what it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Body
from pydantic import ValidationError

from api.deps import JobId, PrincipalDep, ServicesDep
from api.jobs import referenced_profile
from api.schemas import ArtifactOut, SelectionIn, SelectionOut
from compression.device_profile import report_predictor
from compression.report import SubnetworkReport
from compression.selection import reselect
from jobs import records, store
from jobs.errors import Conflict

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

EXAMPLES: dict[str, Any] = {
    "sure": {
        "summary": "Fast enough at the 95th percentile, and sure to lose at most a point",
        "value": {
            "constraints": {
                "max_accuracy_drop": 1.0,
                "max_latency_ms": 8,
                "latency_at": {"percentile": 95},
                "confidence": 0.95,
            }
        },
    },
    "device": {
        "summary": "The fastest on a device that was profiled, with four threads",
        "value": {
            "constraints": {
                "max_accuracy_drop": 1.0,
                "latency_on": "prf_3q2-7wAAQkSgMvUuTqBvxQ",
                "latency_at": {"threads": 4},
            }
        },
    },
    "size": {
        "summary": "The smallest file that is twice as fast as the teacher",
        "value": {"constraints": {"min_speedup": 2, "objective": "size"}},
    },
}


@router.post(
    "/{job_id}/selection",
    summary="Select under other constraints",
    description="From the stored measurements of a job that has succeeded, at once: nothing is "
    "trained, measured or stored, and the job's own selection stays. `latency_at` must be one of "
    "the settings that the job measured; with `latency_on`, any that lies within the profile. "
    "Figures on test are those of the job's own selection alone: test chooses nothing.",
)
def select_again(
    job_id: JobId,
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[SelectionIn, Body(openapi_examples=EXAMPLES)],
) -> SelectionOut:
    project_id = principal.project_id
    with services.database.reading() as session:
        report = store.get_report(session, job_id, project_id=project_id)
        artifacts = store.list_artifacts(session, job_id, project_id=project_id)
        profile = None
        if (named := body.constraints.latency_on) is not None:
            profile = referenced_profile(session, named, project_id)
    subnetworks = _subnetworks(report)
    selection = reselect(
        subnetworks,
        body.constraints,
        main_metric=report.get("main_metric", "accuracy"),
        predictor=None
        if profile is None
        else report_predictor(
            profile, body.constraints, subnetworks, report.get("teacher", {}).get("encoder")
        ),
    )
    return SelectionOut(
        job=job_id,
        constraints=body.constraints,
        selection=selection,
        artifacts=[
            ArtifactOut.of(artifact) for artifact in _of_subnetwork(artifacts, selection.subnetwork)
        ],
    )


def _subnetworks(report: Mapping[str, Any]) -> list[SubnetworkReport]:
    try:
        return [SubnetworkReport.model_validate(stored) for stored in report["subnetworks"]]
    except (KeyError, ValidationError):
        raise Conflict(
            "Another version of this service stored the job's measurements, in a form that this "
            "one does not read. Run the job again to select among new ones.",
            code="report-unreadable",
        ) from None


def _of_subnetwork(
    artifacts: Sequence[records.Artifact], name: str | None
) -> list[records.Artifact]:
    return [artifact for artifact in artifacts if artifact.path.partition("/")[0] == name]
