"""Jobs: planned, created, watched, cancelled. The worker does the rest."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from sqlalchemy.orm import Session

from api.auth import Principal
from api.deps import After, JobId, Limit, PrincipalDep, Services, ServicesDep
from api.errors import ApiError
from api.merge_patch import TooDeep, merge_patch
from api.schemas import (
    ArtifactOut,
    ClonePatch,
    JobIn,
    JobOut,
    JobSummary,
    Page,
    PlanOut,
    SubnetworksOut,
)
from compression.device_profile import DeviceProfile
from compression.errors import CompressionError
from compression.plan import ModelInfo, Plan, make_plan
from compression.tables import DatasetProfile
from jobs import access, deletion, records, store, workers
from jobs.devices import need_of
from jobs.errors import Conflict, NotFound
from jobs.schedule import outlook
from jobs.states import JobState

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_MODEL, _DATASET = "mdl_3q2-7wAAQkSgMvUuTqBvxQ", "dst_u9kXb1mJT0yq0v2n5Qw8Zg"
EXAMPLES: dict[str, Any] = {
    "defaults": {
        "summary": "Widths 1, 3/4, 1/2 and 1/4 with every default",
        "value": {"model": _MODEL, "dataset": _DATASET},
    },
    "constraints": {
        "summary": "The smallest loss that is fast enough",
        "value": {
            "model": _MODEL,
            "dataset": _DATASET,
            "name": "reviews, at most 8 ms",
            "spec": {
                "supernet": {"width_mults": [1, "3/4", "1/2", "1/4"]},
                "constraints": {"max_accuracy_drop": 1.0, "max_latency_ms": 8},
            },
        },
    },
    "questions": {
        "summary": "Answers in a context, read in windows of 384 tokens",
        "value": {
            "model": _MODEL,
            "dataset": _DATASET,
            "spec": {
                "task": {"kind": "question_answering", "max_seq_len": 384, "doc_stride": 128},
                "constraints": {"max_accuracy_drop": 1.0},
            },
        },
    },
    "device": {
        "summary": "Fast enough on a device that was profiled",
        "value": {
            "model": _MODEL,
            "dataset": _DATASET,
            "spec": {
                "constraints": {
                    "max_latency_ms": 40,
                    "latency_on": "prf_3q2-7wAAQkSgMvUuTqBvxQ",
                    "latency_at": {"seq_len": 64, "threads": 2},
                }
            },
        },
    },
    "everything": {
        "summary": "Sentence pairs, a teacher trained first, every stage set",
        "value": {
            "model": _MODEL,
            "dataset": _DATASET,
            "spec": {
                "task": {
                    "text": "question",
                    "text_pair": "passage",
                    "label": "answer",
                    "labels": ["no", "yes"],
                    "max_seq_len": 128,
                },
                "teacher": {"when": "auto", "epochs": 3, "batch_size": 32},
                "importance": {"split": "train", "rows": 1024},
                "supernet": {"width_mults": [1, "2/3", "1/3"]},
                "distillation": {"epochs": 3, "lambda_rep": 0.1, "lambda_logit": 1.0},
                "latency": {"batch_size": 1, "threads": 1, "batch_sizes": [16], "rounds": 50},
                "constraints": {
                    "min_speedup": 2,
                    "max_latency_ms": 60,
                    "latency_at": {"percentile": 95, "batch_size": 16},
                    "max_size_mb": 60,
                    "objective": "accuracy",
                    "confidence": 0.95,
                },
                "export": {"formats": ["safetensors", "onnx"]},
                "device": "cpu",
                "seed": 0,
            },
            "priority": 10,
            "time_limit_minutes": 240,
        },
    },
}
CLONE_EXAMPLES: dict[str, Any] = {
    "same": {"summary": "The same again", "value": {}},
    "changed": {
        "summary": "Other widths, first in the queue, and the default name",
        "value": {
            "name": None,
            "priority": 10,
            "spec": {"supernet": {"width_mults": ["1/2"]}, "constraints": {"max_size_mb": None}},
        },
    },
}


DryRun = Annotated[bool, Query(description="Answer with the plan; store nothing.")]
RequireWorker = Annotated[
    bool, Query(description="Refuse the job where no worker has announced what it needs.")
]
# Where a job's document names each kind of record.
_NAMED_AT = {
    "model": "/model",
    "dataset": "/dataset",
    "profile": "/spec/constraints/latency_on",
}
_PLANNED: dict[int | str, dict[str, Any]] = {
    200: {"model": PlanOut, "description": "The plan (`dry_run=true`)."}
}


@router.post(
    "",
    status_code=202,
    response_model=JobOut,
    summary="Create a job, or only plan it",
    description="The spec is held against model and dataset before anything is queued: columns, "
    "labels, widths against heads and neurons. `?dry_run=true` stops there and answers 200 with "
    "the plan. Where no worker has the device that the spec names, the job is queued and "
    "`queue.warning` says so, or, with `?require_worker=true`, refused with 409.",
    responses=_PLANNED,
)
def create_job(
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[JobIn, Body(openapi_examples=EXAMPLES)],
    response: Response,
    dry_run: DryRun = False,
    require_worker: RequireWorker = False,
) -> Any:
    plan, name = _planned(services, principal, body)
    if dry_run:
        return JSONResponse({"plan": plan.model_dump(mode="json")})
    return _create(services, principal, body, plan, name, response, require_worker=require_worker)


@router.post(
    "/{job_id}/clone",
    status_code=202,
    response_model=JobOut,
    summary="Create a job like another one",
    description="The body is a JSON merge patch (RFC 7396) of the document that the job was "
    'created with, such as `{"priority": 5, "spec": {"supernet": {"width_mults": ["1/2"]}}}`; '
    "without a body the new job is the same. It is planned and checked as any new job; pointers "
    "lead into the patched document.",
    responses=_PLANNED,
)
def clone_job(
    job_id: JobId,
    services: ServicesDep,
    principal: PrincipalDep,
    response: Response,
    body: Annotated[ClonePatch | None, Body(openapi_examples=CLONE_EXAMPLES)] = None,
    dry_run: DryRun = False,
    require_worker: RequireWorker = False,
) -> Any:
    job = _get(services, job_id, principal.project_id)
    wanted = _patched(job, {} if body is None else body.root)
    plan, name = _planned(services, principal, wanted)
    if dry_run:
        return JSONResponse({"plan": plan.model_dump(mode="json")})
    return _create(
        services,
        principal,
        wanted,
        plan,
        name,
        response,
        require_worker=require_worker,
        cloned_from=job_id,
    )


def _patched(job: records.Job, patch: dict[str, Any]) -> JobIn:
    created_with = {
        "model": job.model_id,
        "dataset": job.dataset_id,
        "name": job.name,
        "priority": -job.precedence,
        "time_limit_minutes": None
        if job.time_limit_seconds is None
        else job.time_limit_seconds / 60,
        "spec": job.spec,
    }
    try:
        return JobIn.model_validate(merge_patch(created_with, patch))
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
        raise RequestValidationError(faults) from None
    except TooDeep:
        raise ApiError(
            422,
            "invalid-request",
            "The patch nests deeper than any job's document.",
            title="The request is not valid",
        ) from None


def _planned(services: Services, principal: Principal, body: JobIn) -> tuple[Plan, str]:
    """What the job would do, and the name that it has if it was given none. Nothing is stored."""
    project_id = principal.project_id
    longest = services.settings.job_time_limit_minutes
    if body.time_limit_minutes is not None and body.time_limit_minutes > longest:
        raise ApiError(
            422,
            "invalid-request",
            f"A job may run for {longest:g} minutes here, at most.",
            title="The request is not valid",
            pointer="/time_limit_minutes",
        )
    with services.database.reading() as session:
        model = _referenced(store.get_model, session, body.model, project_id, "/model")
        dataset = _referenced(store.get_dataset, session, body.dataset, project_id, "/dataset")
        named = body.spec.constraints.latency_on
        profile = None
        if named is not None:
            profile = referenced_profile(session, named, project_id, within="/spec")
    return _plan(body, model, dataset, profile), f"{model.name} on {dataset.name}"[:200]


def _create(
    services: Services,
    principal: Principal,
    body: JobIn,
    plan: Plan,
    name: str,
    response: Response,
    *,
    require_worker: bool,
    **details: str,
) -> JobOut:
    """Stores the job. `details` are for the audit log."""
    spec = body.spec.model_dump(mode="json")
    minutes = body.time_limit_minutes or services.settings.job_time_limit_minutes
    if require_worker:
        _require_worker(services, spec)
    try:
        with services.database.transaction() as session:
            job = store.create_job(
                session,
                project_id=principal.project_id,
                name=body.name or name,
                model_id=body.model,
                dataset_id=body.dataset,
                profile_id=body.spec.constraints.latency_on,
                spec=spec,
                plan=plan.model_dump(mode="json"),
                priority=body.priority,
                time_limit_seconds=60 * minutes,
            )
            access.record_action(
                session, principal.actor, "job.created", job.id, name=job.name, **details
            )
    except NotFound as error:
        if error.kind not in _NAMED_AT:
            raise
        raise _unknown_reference(error, _NAMED_AT[error.kind]) from None  # deleted since the plan
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return _queued(services, job)


def _require_worker(services: Services, spec: dict[str, Any]) -> None:
    with services.database.reading() as session:
        missing = workers.announced(session).missing(need_of(spec))
    if missing is not None:
        raise ApiError(409, "no-worker", missing, title="No worker could run the job")


def _queued(services: Services, job: records.Job) -> JobOut:
    """A job that was queued just now, of which the commit had its workers told."""
    with services.database.reading() as session:
        return JobOut.of(job, outlook(session, job))


def _referenced(get: Any, session: Any, id: str, project_id: str, pointer: str) -> Any:
    """A record that the body names: where it is absent, the body is wrong and not the path."""
    try:
        return get(session, id, project_id=project_id)
    except NotFound as error:
        raise _unknown_reference(error, pointer) from None


def _unknown_reference(error: NotFound, pointer: str) -> ApiError:
    return ApiError(
        422,
        "unknown-reference",
        error.message,
        title="The request is not valid",
        pointer=pointer,
    )


def referenced_profile(
    session: Session, id: str, project_id: str, *, within: str = ""
) -> DeviceProfile:
    """What `latency_on` names, below the pointer `within`."""
    pointer = f"{within}/constraints/latency_on"
    record = _referenced(store.get_profile, session, id, project_id, pointer)
    try:
        return DeviceProfile.model_validate(record.content)
    except ValidationError:
        raise Conflict(
            "Another version of this service stored the profile, in a form that this one does not "
            "read. Measure the device again, and upload what comes of it.",
            code="profile-unreadable",
        ) from None


def _plan(
    body: JobIn,
    model: records.Model,
    dataset: records.Dataset,
    profile: DeviceProfile | None,
) -> Plan:
    try:
        return make_plan(
            body.spec,
            ModelInfo.model_validate(model.info),
            DatasetProfile.model_validate(dataset.profile),
            profile,
        )
    except CompressionError as error:
        if error.pointer is not None and error.pointer.startswith("/"):
            error.pointer = "/spec" + error.pointer  # the library's is into the spec
        raise


@router.get("", summary="Jobs, newest first")
def list_jobs(
    services: ServicesDep,
    principal: PrincipalDep,
    after: After = None,
    limit: Limit = 50,
    state: Annotated[JobState | None, Query(description="Only those in this state.")] = None,
) -> Page[JobSummary]:
    with services.database.reading() as session:
        found = store.list_jobs(
            session, project_id=principal.project_id, after=after, limit=limit + 1, state=state
        )
        chosen = store.selections(session, [job.id for job in found])
    return Page[JobSummary].of(found, limit, lambda job: JobSummary.listed(job, chosen.get(job.id)))


def _get(services: Services, job_id: str, project_id: str) -> records.Job:
    with services.database.reading() as session:
        return store.get_job(session, job_id, project_id=project_id)


@router.get("/{job_id}", summary="A job")
def get_job(job_id: JobId, services: ServicesDep, principal: PrincipalDep) -> JobOut:
    with services.database.reading() as session:
        job = store.get_job(session, job_id, project_id=principal.project_id)
        return JobOut.of(job, outlook(session, job))


@router.delete(
    "/{job_id}",
    status_code=204,
    summary="Delete a job",
    description="One that has ended, with its events, its report and its artifacts; 409 otherwise: "
    "cancel it first. All of it is 404 from then on and counts no more against the quota. Its "
    "model, its dataset and the audit log stay.",
    response_class=Response,
)
def delete_job(job_id: JobId, services: ServicesDep, principal: PrincipalDep) -> Response:
    with services.database.transaction() as session:
        deletion.delete_job(session, principal.actor, job_id)
    return Response(status_code=204)


@router.post(
    "/{job_id}/cancel",
    status_code=202,
    summary="Cancel a job",
    description="A queued job is cancelled at once; the worker of a running one stops within "
    "seconds. Asking again changes nothing; 409 if the job has succeeded or failed.",
)
def cancel_job(job_id: JobId, services: ServicesDep, principal: PrincipalDep) -> JobOut:
    with services.database.transaction() as session:
        job = store.request_cancel(session, job_id, project_id=principal.project_id)
        access.record_action(session, principal.actor, "job.cancel_requested", job.id)
        return JobOut.of(job)


@router.post(
    "/{job_id}/retry",
    status_code=202,
    summary="Run a job again that failed or was cancelled",
    description="The same job is queued again, with all its runs and its whole time before it, and "
    "goes on from its last checkpoint, which is kept for an hour unless the installation says "
    "otherwise. 409 if it succeeded (clone it), has not ended, or its model, dataset or profile is "
    "deleted.",
)
def retry_job(job_id: JobId, services: ServicesDep, principal: PrincipalDep) -> JobOut:
    with services.database.transaction() as session:
        job = store.retry_job(session, job_id, project_id=principal.project_id)
        access.record_action(session, principal.actor, "job.retried", job.id)
    return _queued(services, job)


@router.get(
    "/{job_id}/subnetworks",
    summary="What was measured",
    description="Each sub-network with its measurements, the teacher's, and which was selected "
    "and why. Empty until the job has succeeded.",
)
def list_subnetworks(
    job_id: JobId, services: ServicesDep, principal: PrincipalDep
) -> SubnetworksOut:
    job = _get(services, job_id, principal.project_id)
    report = job.report or {}
    return SubnetworksOut(
        state=JobState(job.state),
        main_metric=report.get("main_metric"),
        teacher=report.get("teacher"),
        items=report.get("subnetworks", []),
        selection=report.get("selection"),
    )


@router.get(
    "/{job_id}/artifacts",
    summary="A job's artifacts",
    description="By path, all of them at once: a job has a bounded number.",
)
def list_artifacts(
    job_id: JobId, services: ServicesDep, principal: PrincipalDep
) -> Page[ArtifactOut]:
    with services.database.reading() as session:
        found = store.list_artifacts(session, job_id, project_id=principal.project_id)
    return Page[ArtifactOut].of(found, len(found), ArtifactOut.of)
