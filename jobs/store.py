"""Reads and writes of records, each inside a transaction that the caller opened; those of
projects, API keys and the audit log are in jobs.access.

A worker's writes take the `Claim` that `claim_job` gave it. They lock the job's row and
compare the fencing number, so a run that lost its job raises StaleRun and changes nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, and_, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session, undefer

from jobs import quotas
from jobs.db import now
from jobs.devices import Device, Need, need_of
from jobs.errors import Conflict, Gone, NotFound, StaleRun
from jobs.nudges import note_event, note_queued
from jobs.paging import get_of_project, page_of_project
from jobs.records import (
    Artifact,
    Dataset,
    DeletedJob,
    Event,
    Job,
    Model,
    Profile,
    Run,
    Worker,
    new_id,
)
from jobs.redaction import redact_all
from jobs.states import JobState, RunState, check_transition
from jobs.webhooks import add_deliveries

_UNROUTED = "unrouted"

R = TypeVar("R", Model, Dataset, Artifact)


@dataclass(frozen=True)
class Claim:
    """The right to run a job, until its lease ends or another run has a higher `fence`.

    `model_files` and `dataset_files` are what the run stages in: see records.Model; and of
    `checkpoints` (records.Job) the newest that is good. `profile`: the content of the device's
    profile that the spec names, if it names one. `seconds_left` are those of the job's time limit
    that the runs before have not used; None without one.
    """

    job_id: str
    project_id: str
    run_id: str
    fence: int
    worker: str
    spec: dict[str, Any]
    model_files: tuple[dict[str, Any], ...]
    dataset_files: tuple[dict[str, Any], ...]
    checkpoints: tuple[dict[str, Any], ...]
    profile: dict[str, Any] | None = None
    seconds_left: float | None = None


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits, and what it waits for."""

    id: str
    need: Need


def json_safe(value: Any) -> Any:
    """`value` as JSON that every database takes: no NaN, no infinity, no NUL characters."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {json_safe(str(key)): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return value


# --- models, datasets and profiles ----------------------------------------------------------------


def add_model(
    session: Session,
    *,
    id: str,
    project_id: str,
    name: str,
    size_bytes: int,
    uploads: Sequence[Mapping[str, Any]],
    files: Sequence[Mapping[str, Any]],
    info: Mapping[str, Any],
    warnings: Sequence[str] = (),
) -> Model:
    """Stores an inspected model whose `files` already lie in the object store."""
    model = Model(
        id=id,
        project_id=project_id,
        name=name,
        size_bytes=size_bytes,
        uploads=json_safe(uploads),
        files=json_safe(files),
        info=json_safe(info),
        warnings=json_safe(warnings),
        created_at=now(session),
    )
    session.add(model)
    session.flush()
    return model


def add_dataset(
    session: Session,
    *,
    id: str,
    project_id: str,
    name: str,
    size_bytes: int,
    uploads: Sequence[Mapping[str, Any]],
    files: Sequence[Mapping[str, Any]],
    profile: Mapping[str, Any],
    warnings: Sequence[str] = (),
) -> Dataset:
    """Stores an inspected dataset whose `files` already lie in the object store."""
    dataset = Dataset(
        id=id,
        project_id=project_id,
        name=name,
        size_bytes=size_bytes,
        uploads=json_safe(uploads),
        files=json_safe(files),
        profile=json_safe(profile),
        warnings=json_safe(warnings),
        created_at=now(session),
    )
    session.add(dataset)
    session.flush()
    return dataset


def add_profile(
    session: Session,
    *,
    project_id: str,
    name: str,
    sha256: str,
    summary: Mapping[str, Any],
    content: Mapping[str, Any],
) -> Profile:
    """Stores a profile that has been validated."""
    profile = Profile(
        id=new_id("profile"),
        project_id=project_id,
        name=name,
        sha256=sha256,
        summary=json_safe(summary),
        content=json_safe(content),
        created_at=now(session),
    )
    session.add(profile)
    session.flush()
    return profile


def get_model(session: Session, id: str, *, project_id: str) -> Model:
    """NotFound; Gone once it was deleted."""
    return present(get_of_project(session, Model, "model", id, project_id), "model")


def get_dataset(session: Session, id: str, *, project_id: str) -> Dataset:
    return present(get_of_project(session, Dataset, "dataset", id, project_id), "dataset")


def present(record: R, kind: str) -> R:
    """The record; Gone where it was deleted."""
    if record.deleted_at is not None:
        at = f"{record.deleted_at:%Y-%m-%d %H:%M} UTC"
        raise Gone(kind, record.id, f"The {kind} {record.id!r} was deleted on {at}.")
    return record


def _hold_for_job(session: Session, model_id: str, dataset_id: str, profile_id: str | None) -> None:
    """Nobody deletes them until the transaction ends: see jobs.deletion."""
    for record, id in ((Model, model_id), (Dataset, dataset_id), (Profile, profile_id)):
        session.scalars(
            select(record)
            .where(record.id == id)
            .with_for_update(read=True)
            .execution_options(populate_existing=True)
        ).all()


def get_profile(session: Session, id: str, *, project_id: str) -> Profile:
    """With its content, in one query: by a second one it may be deleted."""
    profile = session.scalar(
        select(Profile)
        .where(Profile.id == id, Profile.project_id == project_id)
        .options(undefer(Profile.content))
        .execution_options(populate_existing=True)
    )
    if profile is None:
        raise NotFound("profile", id)
    return profile


def list_models(
    session: Session, *, project_id: str, after: str | None = None, limit: int = 50
) -> list[Model]:
    """Newest first; `after` as in page_of_project."""
    return page_of_project(
        session, Model, "model", project_id, after, limit, Model.deleted_at.is_(None)
    )


def list_datasets(
    session: Session, *, project_id: str, after: str | None = None, limit: int = 50
) -> list[Dataset]:
    return page_of_project(
        session, Dataset, "dataset", project_id, after, limit, Dataset.deleted_at.is_(None)
    )


def list_profiles(
    session: Session, *, project_id: str, after: str | None = None, limit: int = 50
) -> list[Profile]:
    return page_of_project(session, Profile, "profile", project_id, after, limit)


# --- jobs, as their users see them ------------------------------------------------------


def create_job(
    session: Session,
    *,
    project_id: str,
    name: str,
    model_id: str,
    dataset_id: str,
    spec: Mapping[str, Any],
    plan: Mapping[str, Any] | None = None,
    profile_id: str | None = None,
    priority: int = 0,
    time_limit_seconds: float | None = None,
) -> Job:
    """A queued job with its first event, of which workers are to be told after the commit
    (jobs.nudges). Of two jobs in one queue the one with the higher `priority` comes first, then the
    older one.
    QuotaExceeded where the project may not have one more."""
    quotas.check_job(session, project_id)
    _hold_for_job(session, model_id, dataset_id, profile_id)
    get_model(session, model_id, project_id=project_id)
    get_dataset(session, dataset_id, project_id=project_id)
    if profile_id is not None:
        get_profile(session, profile_id, project_id=project_id)
    at = now(session)
    job = Job(
        id=new_id("job"),
        project_id=project_id,
        name=name,
        model_id=model_id,
        dataset_id=dataset_id,
        profile_id=profile_id,
        spec=json_safe(spec),
        plan=json_safe(plan),
        state=JobState.QUEUED,
        fence=0,
        attempts=0,
        cancel_requested=False,
        lease_expires_at=None,
        last_event=0,
        report=None,
        error=None,
        checkpoints=None,
        created_at=at,
        started_at=None,
        finished_at=None,
        precedence=-priority,
        device=need_of(spec).device,
        predicted_seconds=(plan or {}).get("predicted_seconds"),
        time_limit_seconds=time_limit_seconds,
        retried_at=None,
    )
    session.add(job)
    session.flush()
    _add_event(session, job, "queued", {}, at)
    note_queued(session, job.id, need_of(spec).device)
    return job


def get_job(session: Session, id: str, *, project_id: str) -> Job:
    return get_of_project(session, Job, "job", id, project_id)


def get_report(session: Session, job_id: str, *, project_id: str) -> dict[str, Any]:
    """What a job measured. Conflict ("job-not-succeeded") where it has not come to that."""
    job = get_job(session, job_id, project_id=project_id)
    if job.state != JobState.SUCCEEDED or job.report is None:
        raise Conflict(
            f"The job is {job.state}; what it measured can be asked once it has succeeded.",
            code="job-not-succeeded",
        )
    return dict(job.report)


def list_jobs(
    session: Session,
    *,
    project_id: str,
    after: str | None = None,
    limit: int = 50,
    state: JobState | None = None,
) -> list[Job]:
    """Newest first, without their documents, which may be long; `after` as in page_of_project."""
    conditions = [] if state is None else [Job.state == state]
    documents = (Job.spec, Job.plan, Job.report, Job.checkpoints)
    return page_of_project(
        session, Job, "job", project_id, after, limit, *conditions, without=documents
    )


def selections(session: Session, job_ids: Sequence[str]) -> dict[str, Any]:
    """What was chosen, of those of some hundred jobs that have come to that."""
    found = session.execute(
        select(Job.id, Job.report["selection"]).where(Job.id.in_(job_ids), Job.report.is_not(None))
    )
    return {id: selection for id, selection in found if selection is not None}


def list_events(
    session: Session, job_id: str, *, project_id: str, after: int = 0, limit: int = 100
) -> list[Event]:
    """Events with a number above `after`, oldest first. NotFound for an unknown job."""
    get_job(session, job_id, project_id=project_id)
    return events_after(session, job_id, after, limit=limit)


def events_after(session: Session, job_id: str, after: int, *, limit: int) -> list[Event]:
    """The same for whoever may see the job; none of an unknown one."""
    return list(
        session.scalars(
            select(Event)
            .where(Event.job_id == job_id, Event.number > after)
            .order_by(Event.number)
            .limit(limit)
        )
    )


@dataclass(frozen=True)
class EventHead:
    """How far a job's history has come."""

    state: JobState
    last_event: int


def event_heads(session: Session, job_ids: Sequence[str]) -> dict[str, EventHead]:
    """By job; some hundreds at most. Unknown ones are left out."""
    found = session.execute(select(Job.id, Job.state, Job.last_event).where(Job.id.in_(job_ids)))
    return {id: EventHead(JobState(state), last_event) for id, state, last_event in found}


def list_artifacts(session: Session, job_id: str, *, project_id: str) -> list[Artifact]:
    """The artifacts of a job that succeeded, by path; none before."""
    get_job(session, job_id, project_id=project_id)
    return list(
        session.scalars(
            _published_artifacts(project_id)
            .where(Artifact.job_id == job_id, Artifact.deleted_at.is_(None))
            .order_by(Artifact.path)
        )
    )


def get_artifact(session: Session, id: str, *, project_id: str) -> Artifact:
    found = session.scalar(_published_artifacts(project_id).where(Artifact.id == id))
    if found is None:
        raise NotFound("artifact", id)
    return present(found, "artifact")


def _published_artifacts(project_id: str) -> Select[Artifact]:
    """Those that the job's current run named, once it has succeeded."""
    return (
        select(Artifact)
        .join(Job, and_(Job.id == Artifact.job_id, Job.fence == Artifact.fence))
        .where(Artifact.project_id == project_id, Job.state == JobState.SUCCEEDED)
    )


def request_cancel(session: Session, job_id: str, *, project_id: str) -> Job:
    """Cancels a queued job at once; asks the worker of a running one to stop.

    Asking again changes nothing. Conflict ("job-finished") if it succeeded or failed.
    """
    job = _lock_of_project(session, job_id, project_id)
    if job.state == JobState.CANCELLED:
        return job
    if job.state.is_final:
        raise Conflict(f"The job has already {job.state}.", code="job-finished")
    job.cancel_requested = True
    at = now(session)
    if job.state == JobState.QUEUED:
        _end(session, job, JobState.CANCELLED, {}, at)
    elif job.lease_expires_at is not None and job.lease_expires_at < at:
        # Its worker went silent, and there may be no other to see to it.
        _end(session, job, JobState.CANCELLED, {"run": job.fence}, at, run=RunState.LOST)
    session.flush()
    return job


def retry_job(session: Session, job_id: str, *, project_id: str) -> Job:
    """Queues a job that failed or was cancelled again, with all its runs and its whole time before
    it; it goes on from its checkpoints, as long as they are kept. Conflict if it succeeded
    ("job-succeeded"), has not ended ("job-not-finished"), or its model, dataset or profile was
    deleted ("input-deleted"); QuotaExceeded as for a new job."""
    job = get_job(session, job_id, project_id=project_id)
    _check_retried(job)
    # Its project, then what it needs, then itself: in the order in which others hold them.
    quotas.check_job(session, project_id)
    _hold_for_job(session, job.model_id, job.dataset_id, job.profile_id)
    try:
        get_model(session, job.model_id, project_id=project_id)
        get_dataset(session, job.dataset_id, project_id=project_id)
        if (named := job.spec.get("constraints", {}).get("latency_on")) is not None:
            get_profile(session, named, project_id=project_id)
    except NotFound as error:
        raise Conflict(f"The job cannot run again. {error.message}", code="input-deleted") from None
    job = _lock_of_project(session, job_id, project_id)
    _check_retried(job)
    check_transition(job.state, JobState.QUEUED)
    at = now(session)
    job.state = JobState.QUEUED
    job.attempts = 0
    job.cancel_requested = False
    job.error = None
    job.started_at = job.finished_at = None
    job.retried_at = at
    job.device = need_of(job.spec).device
    _add_event(session, job, "queued", {"retry": True}, at)
    note_queued(session, job.id, job.device)
    return job


def _check_retried(job: Job) -> None:
    if job.state == JobState.SUCCEEDED:
        raise Conflict("The job has succeeded; clone it to run it again.", code="job-succeeded")
    if not job.state.is_final:
        raise Conflict(f"The job is {job.state} already.", code="job-not-finished")


def _lock_of_project(session: Session, job_id: str, project_id: str) -> Job:
    job = session.scalar(
        select(Job)
        .where(Job.id == job_id, Job.project_id == project_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if job is None:
        raise NotFound("job", job_id)
    return job


# --- jobs, as workers see them ----------------------------------------------------------


def claim_job(
    session: Session,
    job_id: str,
    *,
    worker: str,
    lease_seconds: float,
    max_runs: int,
    devices: Collection[Device] = frozenset(Device),
) -> Claim | None:
    """Opens a run of a job that is queued, or running under a lease that has expired.

    None if the job is not to be had: another run holds it, it ended, it waits for none of
    `devices`, the worker (its name) is to take no more, its project has as many running as it
    may, or (its lease having expired) it is `settle_expired`'s to cancel or fail. One UPDATE
    compares and sets.
    """
    quotas.hold_for_claim(session, job_id)
    at = now(session)
    claimed = session.execute(
        update(Job)
        .where(
            Job.id == job_id,
            or_(
                and_(Job.state == JobState.QUEUED, quotas.has_room_to_run()),
                and_(Job.state == JobState.RUNNING, Job.lease_expires_at < at),
            ),
            Job.cancel_requested.is_(False),
            Job.attempts < max_runs,
            Job.device.in_(devices),
            ~_drains(worker),
        )
        .values(
            state=JobState.RUNNING,
            fence=Job.fence + 1,
            attempts=Job.attempts + 1,
            lease_expires_at=at + timedelta(seconds=lease_seconds),
            started_at=func.coalesce(Job.started_at, at),
        )
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    ).scalar()
    if claimed is None:
        return None
    job = session.get_one(Job, job_id, populate_existing=True)
    _end_run(session, job_id, RunState.LOST, at)  # the one whose lease expired, if any
    run = Run(
        id=new_id("run"),
        project_id=job.project_id,
        job_id=job_id,
        fence=job.fence,
        worker=worker,
        state=RunState.RUNNING,
        started_at=at,
        ended_at=None,
        swept_at=None,
    )
    session.add(run)
    _add_event(session, job, "started", {"run": job.fence, "worker": worker}, at)
    return Claim(
        job_id=job_id,
        project_id=job.project_id,
        run_id=run.id,
        fence=job.fence,
        worker=worker,
        spec=job.spec,
        model_files=tuple(session.get_one(Model, job.model_id).files),
        dataset_files=tuple(session.get_one(Dataset, job.dataset_id).files),
        checkpoints=tuple(job.checkpoints or ()),
        profile=None
        if job.profile_id is None
        else get_profile(session, job.profile_id, project_id=job.project_id).content,
        seconds_left=_seconds_left(session, job),
    )


def _drains(worker: str) -> ColumnElement[bool]:
    return exists().where(Worker.name == worker, Worker.drain_requested_at.is_not(None))


def _seconds_left(session: Session, job: Job) -> float | None:
    """Of the time limit, over the runs that have ended since the job was created or retried."""
    if job.time_limit_seconds is None:
        return None
    runs = select(Run).where(Run.job_id == job.id, Run.ended_at.is_not(None))
    if job.retried_at is not None:
        runs = runs.where(Run.started_at >= job.retried_at)
    used = sum(
        (run.ended_at - run.started_at).total_seconds()
        for run in session.scalars(runs)
        if run.ended_at is not None
    )
    return job.time_limit_seconds - used


def renew_lease(session: Session, claim: Claim, *, lease_seconds: float) -> bool:
    """True if the job's user asked to cancel it. StaleRun if the job is no longer ours."""
    job = _hold(session, claim)
    job.lease_expires_at = now(session) + timedelta(seconds=lease_seconds)
    session.flush()
    return job.cancel_requested


def append_events(
    session: Session, claim: Claim, events: Sequence[tuple[str, Mapping[str, Any]]]
) -> None:
    """Adds (kind, data) pairs to the job's history, in this order."""
    job = _hold(session, claim)
    at = now(session)
    for kind, data in events:
        _add_event(session, job, kind, data, at)


def add_checkpoint(
    session: Session,
    claim: Claim,
    *,
    name: str,
    key: str,
    size_bytes: int,
    sha256: str,
    stage: str,
    step: int,
) -> None:
    """Names an object that is already stored as the job's newest checkpoint, with its event."""
    job = _hold(session, claim)
    at = now(session)
    file = {"name": name, "key": key, "size_bytes": size_bytes, "sha256": sha256}
    checkpoint = {**file, "stage": stage, "step": step, "stored_at": at.isoformat()}
    job.checkpoints = [checkpoint, *(job.checkpoints or ())]
    _add_event(session, job, "checkpoint", {"stage": stage, "step": step, "name": name}, at)


def add_artifact(
    session: Session,
    claim: Claim,
    *,
    path: str,
    key: str,
    size_bytes: int,
    sha256: str,
    media_type: str,
) -> Artifact:
    """Names an object that is already stored. Seen by users once the job has succeeded."""
    _hold(session, claim)
    artifact = Artifact(
        id=new_id("artifact"),
        project_id=claim.project_id,
        job_id=claim.job_id,
        fence=claim.fence,
        path=path,
        key=key,
        size_bytes=size_bytes,
        sha256=sha256,
        media_type=media_type,
        created_at=now(session),
    )
    session.add(artifact)
    session.flush()
    return artifact


def finish_job(
    session: Session,
    claim: Claim,
    state: JobState,
    *,
    report: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
) -> None:
    """The run's last write: the job ends as succeeded (with a report), failed (with an
    error) or cancelled."""
    job = _hold(session, claim)
    data: dict[str, Any] = {"run": claim.fence}
    if report is not None:
        data["selection"] = report.get("selection")
    if error is not None:
        data["error"] = error
    job.report = json_safe(report)
    job.error = redact_all(json_safe(error))
    _end(session, job, state, data, now(session))


def release_job(session: Session, claim: Claim, *, reason: str) -> None:
    """Hands the job back: queued again, and the run is not counted."""
    job = _hold(session, claim)
    at = now(session)
    if job.cancel_requested:
        _end(session, job, JobState.CANCELLED, {"run": claim.fence}, at)
        return
    job.attempts -= 1
    _requeue(session, job, RunState.RELEASED, reason, at)


def settle_expired(session: Session, job_id: str, *, max_runs: int) -> JobState | None:
    """Takes a job from a run whose lease has expired; the job's new state.

    Queued again; or cancelled, if that was asked for; or failed, after `max_runs` runs.
    None if the job is not running or its lease still holds.
    """
    job = session.scalar(
        select(Job)
        .where(Job.id == job_id, Job.state == JobState.RUNNING)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    at = now(session)
    if job is None or job.lease_expires_at is None or job.lease_expires_at >= at:
        return None
    if job.cancel_requested:
        _end(session, job, JobState.CANCELLED, {"run": job.fence}, at, run=RunState.LOST)
    elif job.attempts >= max_runs:
        times = "once" if job.attempts == 1 else f"{job.attempts} times"
        job.error = {
            "code": "killed-its-worker",
            "message": f"The job kept killing its worker: {times} the worker that ran it went "
            "silent before the job ended. It is not tried again by itself.",
            "pointer": None,
            "rows": [],
        }
        data = {"run": job.fence, "error": job.error}
        _end(session, job, JobState.FAILED, data, at, run=RunState.LOST)
    else:
        _requeue(session, job, RunState.LOST, "its worker went silent", at)
    return job.state


def expired_jobs(session: Session, *, limit: int = 100) -> list[str]:
    """Ids of running jobs whose lease has expired, oldest first."""
    return list(
        session.scalars(
            select(Job.id)
            .where(Job.state == JobState.RUNNING, Job.lease_expires_at < now(session))
            .order_by(Job.created_at, Job.id)
            .limit(limit)
        )
    )


def queued_jobs(
    session: Session, *, devices: Iterable[Device] = Device, limit: int = 100
) -> list[QueuedJob]:
    """Jobs that wait for one of `devices`, in the order in which they are to be taken."""
    queues = (
        session.execute(
            select(Job.precedence, Job.created_at, Job.id, Job.spec)
            .where(Job.state == JobState.QUEUED, Job.device == device, quotas.has_room_to_run())
            .order_by(Job.precedence, Job.created_at, Job.id)
            .limit(limit)
        ).all()
        for device in devices
    )
    merged = heapq.merge(*queues, key=lambda row: row[:3])
    return [QueuedJob(id, need_of(spec)) for _, _, id, spec in islice(merged, limit)]


def takes_no_more(session: Session, worker: str) -> bool:
    """Whether the worker of this name is being drained."""
    return bool(session.scalar(select(_drains(worker))))


def unrouted_jobs(session: Session, *, limit: int = 100) -> list[str]:
    """Queued jobs that a process of a version with a single queue has stored."""
    return list(
        session.scalars(
            select(Job.id)
            .where(Job.state == JobState.QUEUED, Job.device.is_(None))
            .order_by(Job.created_at, Job.id)
            .limit(limit)
        )
    )


def route_job(session: Session, job_id: str) -> None:
    """Puts a job into the queue of the device that its spec names."""
    job = session.scalar(
        select(Job)
        .where(Job.id == job_id, Job.device.is_(None))
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if job is not None:
        job.device = need_of(job.spec).device


@dataclass(frozen=True)
class QueueFigures:
    """`counts`: of jobs that have not ended, by state and device. `longest_seconds`: by device, for
    how long the queued job that has waited longest has, since it was last queued; 0 without one."""

    counts: dict[tuple[str, str], int]
    longest_seconds: dict[str, float]


def queue_figures(session: Session) -> QueueFigures:
    """The device is `unrouted` where a process of a version with a single queue stored the job."""
    open_states = [state for state in JobState if not state.is_final]
    counts = {(state.value, device.value): 0 for state in open_states for device in Device}
    longest = dict.fromkeys((device.value for device in Device), 0.0)
    for state, device, count in session.execute(
        select(Job.state, Job.device, func.count())
        .where(Job.state.in_(open_states))
        .group_by(Job.state, Job.device)
    ):
        counts[state.value, _UNROUTED if device is None else device.value] = count
    at = now(session)
    # The last event of a queued job is what queued it: made, retried, handed back or lost.
    for device, since in session.execute(
        select(Job.device, func.min(Event.created_at))
        .join(Event, and_(Event.job_id == Job.id, Event.number == Job.last_event))
        .where(Job.state == JobState.QUEUED)
        .group_by(Job.device)
    ):
        name = _UNROUTED if device is None else device.value
        longest[name] = max(0.0, (at - since).total_seconds())
    return QueueFigures(counts, longest)


def seconds_in_queue(session: Session, job_id: str, fence: int) -> float:
    """How long the job lay there before its newest run, which this transaction has just opened."""
    since = session.scalar(
        select(Event.created_at)
        .where(Event.job_id == job_id, Event.fence < fence)
        .order_by(Event.number.desc())
        .limit(1)
    )
    return 0.0 if since is None else (now(session) - since).total_seconds()


def unswept_runs(session: Session, *, grace_seconds: float, limit: int = 100) -> list[Run]:
    """Runs that ended at least `grace_seconds` ago and may have left objects without a record."""
    return list(
        session.scalars(
            select(Run)
            .where(
                Run.state != RunState.RUNNING,
                Run.swept_at.is_(None),
                Run.ended_at < now(session) - timedelta(seconds=grace_seconds),
            )
            .order_by(Run.ended_at)
            .limit(limit)
        )
    )


def mark_swept(session: Session, run_id: str) -> None:
    session.execute(
        update(Run)
        .where(Run.id == run_id)
        .values(swept_at=now(session))
        .execution_options(synchronize_session=False)
    )


def sweep_again(session: Session, claim: Claim) -> None:
    """For a run that has lost its job: what it was putting into the store meanwhile may have come
    after it was swept, or after its job was deleted."""
    if session.get(Run, claim.run_id) is None:
        sweep_deleted_job(session, claim.job_id, project_id=claim.project_id)
        return
    session.execute(
        update(Run)
        .where(Run.id == claim.run_id, Run.swept_at.is_not(None))
        .values(swept_at=None)
        .execution_options(synchronize_session=False)
    )


def sweep_deleted_job(session: Session, job_id: str, *, project_id: str) -> None:
    """Has the objects of a job that has no record any more deleted, after the grace period."""
    # Held, or a sweep that is just over would forget it before it is written.
    known = session.get(DeletedJob, job_id, with_for_update=True)
    at = now(session)
    if known is None:
        session.add(DeletedJob(id=job_id, project_id=project_id, deleted_at=at))
    else:
        known.deleted_at = at
    session.flush()


def unswept_deleted_jobs(
    session: Session, *, grace_seconds: float, limit: int = 100
) -> list[DeletedJob]:
    """Those deleted at least `grace_seconds` ago, whose objects may still be there."""
    return list(
        session.scalars(
            select(DeletedJob)
            .where(DeletedJob.deleted_at <= now(session) - timedelta(seconds=grace_seconds))
            .order_by(DeletedJob.deleted_at)
            .limit(limit)
        )
    )


def forget_deleted_job(session: Session, job: DeletedJob) -> None:
    """Call it once its objects are deleted; it stays if there may be more since."""
    session.execute(
        delete(DeletedJob).where(DeletedJob.id == job.id, DeletedJob.deleted_at == job.deleted_at)
    )


def spent_checkpoints(session: Session, *, kept: int, grace_seconds: float) -> dict[str, list[str]]:
    """Keys, by job, of checkpoints that no run will want: those of jobs that ended at least
    `grace_seconds` ago, and all but the newest `kept` of the others, where each was stored as
    long ago (a slow run may still be staging it in)."""
    before = now(session) - timedelta(seconds=grace_seconds)
    spent: dict[str, list[str]] = {}
    for job in session.scalars(select(Job).where(Job.checkpoints.is_not(None))):
        checkpoints = job.checkpoints or []
        if job.finished_at is not None:
            old = checkpoints if job.finished_at < before else []
        else:
            old = [
                each
                for each in checkpoints[kept:]
                if datetime.fromisoformat(each["stored_at"]) < before
            ]
        if old:
            spent[job.id] = [each["key"] for each in old]
    return spent


def forget_checkpoints(session: Session, job_id: str, keys: Sequence[str]) -> None:
    """Call it once their objects are deleted."""
    job = session.scalar(
        select(Job)
        .where(Job.id == job_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if job is None:
        return  # deleted meanwhile
    left = [each for each in job.checkpoints or () if each["key"] not in keys]
    job.checkpoints = left or None


def checkpoint_keys(session: Session, job_id: str) -> list[str]:
    """Objects of a job that a run may still resume from, whichever run stored them; none of one
    that was deleted."""
    job = session.get(Job, job_id)
    return [] if job is None else [each["key"] for each in job.checkpoints or ()]


def _hold(session: Session, claim: Claim) -> Job:
    """The claim's job, its row locked. StaleRun if another run, or nobody, holds it now.

    A lease that has expired but was not taken by anybody is still the claim's own.
    """
    job = session.scalar(
        select(Job)
        .where(Job.id == claim.job_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if job is None or job.state != JobState.RUNNING or job.fence != claim.fence:
        raise StaleRun(claim.job_id, claim.fence)
    return job


def _add_event(
    session: Session, job: Job, kind: str, data: Mapping[str, Any], at: datetime
) -> None:
    """Numbers the event from the job's row, which this transaction must hold locked: so
    numbers become visible in their order, and a reader's cursor never skips one."""
    job.last_event += 1
    event = Event(
        job_id=job.id,
        number=job.last_event,
        project_id=job.project_id,
        fence=job.fence,
        kind=kind,
        # What a job's process says goes to whoever reads the job.
        data=redact_all(json_safe(data)),
        created_at=at,
    )
    session.add(event)
    session.flush()
    add_deliveries(session, event)
    note_event(session, job.id)


def _end_run(session: Session, job_id: str, state: RunState, at: datetime) -> None:
    session.execute(
        update(Run)
        .where(Run.job_id == job_id, Run.state == RunState.RUNNING)
        .values(state=state, ended_at=at)
        .execution_options(synchronize_session=False)
    )


def _end(
    session: Session,
    job: Job,
    state: JobState,
    data: Mapping[str, Any],
    at: datetime,
    *,
    run: RunState | None = None,
) -> None:
    check_transition(job.state, state)
    job.state = state
    job.lease_expires_at = None
    job.finished_at = at
    _end_run(session, job.id, run or RunState(state), at)
    _add_event(session, job, state, data, at)


def _requeue(session: Session, job: Job, run: RunState, reason: str, at: datetime) -> None:
    check_transition(job.state, JobState.QUEUED)
    job.state = JobState.QUEUED
    job.lease_expires_at = None
    _end_run(session, job.id, run, at)
    _add_event(session, job, "requeued", {"run": job.fence, "reason": reason}, at)
