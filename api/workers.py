"""Workers: who is there, what they run, and taking one out of service."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from api.auth import Principal
from api.deps import PrincipalDep, Services, ServicesDep
from api.errors import ApiError
from api.schemas import Id, Page, WorkerOut
from jobs import access, records, workers
from jobs.db import now

router = APIRouter(prefix="/v1/workers", tags=["workers"])
WorkerId = Annotated[Id, Path(examples=["wrk_3q2-7wAAQkSgMvUuTqBvxQ"])]


@router.get(
    "",
    summary="Workers, the oldest first",
    description="All of them at once, with what they offer and what they run. They serve every "
    "project: jobs of others count as busy, and their ids are not shown. A worker that has been "
    "silent for as long as a lease is `lost`; it goes from the list after a day.",
)
def list_workers(services: ServicesDep, principal: PrincipalDep) -> Page[WorkerOut]:
    with services.database.reading() as session:
        found = workers.list_workers(session)
        loads, at = workers.loads(session, found), now(session)
    items = [
        WorkerOut.of(worker, loads[worker.name], at=at, project_id=principal.project_id)
        for worker in found
    ]
    return Page[WorkerOut](items=items, next=None)


@router.post(
    "/{worker_id}/drain",
    summary="Drain a worker",
    description="From now on it is given no job and finishes those that it has; then it is "
    "`drained`, and can be stopped without interrupting anything. For an admin of the "
    "installation's first project. Asking again changes nothing; a worker that is started anew "
    "is another worker.",
)
def drain_worker(worker_id: WorkerId, services: ServicesDep, principal: PrincipalDep) -> WorkerOut:
    _require_operator(principal)
    with services.database.transaction() as session:
        worker, changed = workers.drain(session, worker_id)
        if changed:
            access.record_action(
                session, principal.actor, "worker.drained", worker.id, name=worker.name
            )
    return _shown(services, worker, principal)


@router.delete(
    "/{worker_id}/drain",
    summary="Let a worker take jobs again",
    description="Undoes a drain, at once. Asking again changes nothing.",
)
def undrain_worker(
    worker_id: WorkerId, services: ServicesDep, principal: PrincipalDep
) -> WorkerOut:
    _require_operator(principal)
    with services.database.transaction() as session:
        worker, changed = workers.undrain(session, worker_id)
        if changed:
            access.record_action(
                session, principal.actor, "worker.undrained", worker.id, name=worker.name
            )
    return _shown(services, worker, principal)


def _shown(services: Services, worker: records.Worker, principal: Principal) -> WorkerOut:
    with services.database.reading() as session:
        load = workers.loads(session, [worker])[worker.name]
        return WorkerOut.of(worker, load, at=now(session), project_id=principal.project_id)


def _require_operator(principal: Principal) -> None:
    if not principal.is_operator:
        raise ApiError(
            403,
            "operator-only",
            "Workers serve every project: an admin of the installation's first project drains "
            "them.",
            title="Only the installation's operator may do this",
        )
