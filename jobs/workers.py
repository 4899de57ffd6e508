"""The workers that there are, each call inside a transaction that the caller opened.

A worker announces itself and is heard of again and again; one that stops takes its row away, one
that falls silent is lost. None of this decides who runs what: a claim does (jobs.store), and it
asks the row whether the worker is being drained.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import and_, delete, func, select, update
from sqlalchemy.orm import Session

from jobs.db import now
from jobs.devices import Device, Need, need_of
from jobs.errors import NotFound
from jobs.records import Job, Run, Worker, new_id
from jobs.states import JobState

KEPT_LOST = timedelta(days=1)  # so that an operator sees who went missing over night


class WorkerState(StrEnum):
    ACTIVE = "active"
    DRAINING = "draining"  # takes no more, and still runs jobs
    DRAINED = "drained"  # takes no more, and runs none
    LOST = "lost"


@dataclass
class Load:
    """What a worker runs: ids of its jobs with their projects', and slots in use by device."""

    jobs: list[tuple[str, str]] = field(default_factory=list)  # (job, project)
    busy: dict[Device, int] = field(default_factory=lambda: dict.fromkeys(Device, 0))


@dataclass(frozen=True)
class Announced:
    """How many jobs all can run at once, by device, and the most GPUs that one of them has."""

    slots: Mapping[Device, int]
    gpus_together: int

    def missing(self, need: Need) -> str | None:
        """What nobody has of what a job needs, in a sentence; None if one worker has it all."""
        if self.slots[need.device] == 0:
            return f"No worker has announced the device {need.device}."
        wanted = (need.first or 0) + need.count
        if need.device == Device.GPU and wanted > self.gpus_together:
            return f"No worker has announced {wanted} GPUs."
        return None


def announce(session: Session, *, name: str, slots: int, gpus: int, lease_seconds: float) -> Worker:
    """A worker's first sign of life, or the first after its row was given up."""
    at = now(session)
    worker = Worker(
        id=new_id("worker"),
        name=name,
        slots=slots,
        gpus=gpus,
        started_at=at,
        seen_at=at,
        lease_expires_at=at + timedelta(seconds=lease_seconds),
        drain_requested_at=None,
    )
    session.add(worker)
    session.flush()
    return worker


def renew(session: Session, name: str, *, lease_seconds: float) -> bool:
    """Another sign of life. False if the worker is not announced."""
    at = now(session)
    renewed = session.execute(
        update(Worker)
        .where(Worker.name == name)
        .values(seen_at=at, lease_expires_at=at + timedelta(seconds=lease_seconds))
        .returning(Worker.id)
        .execution_options(synchronize_session=False)
    ).scalar()
    return renewed is not None


def leave(session: Session, name: str) -> None:
    """A worker's last word."""
    session.execute(delete(Worker).where(Worker.name == name))


def forget_lost(session: Session) -> int:
    """How many rows went, of workers that have been lost for a day."""
    gone = session.execute(
        delete(Worker)
        .where(Worker.lease_expires_at < now(session) - KEPT_LOST)
        .returning(Worker.id)
    ).all()
    return len(gone)


def list_workers(session: Session) -> list[Worker]:
    """All of them, the oldest first: an installation has a bounded number."""
    return list(session.scalars(select(Worker).order_by(Worker.started_at, Worker.id)))


def get_worker(session: Session, id: str) -> Worker:
    worker = session.get(Worker, id)
    if worker is None:
        raise NotFound("worker", id)
    return worker


def drain(session: Session, id: str) -> tuple[Worker, bool]:
    """From this commit on the worker is given no job, and finishes those that it has. Also whether
    that is news: asking again changes nothing."""
    return _set_drain(session, id, now(session), Worker.drain_requested_at.is_(None))


def undrain(session: Session, id: str) -> tuple[Worker, bool]:
    """From this commit on the worker takes jobs again, from its next look at the queue on."""
    return _set_drain(session, id, None, Worker.drain_requested_at.is_not(None))


def _set_drain(
    session: Session, id: str, at: datetime | None, is_news: object
) -> tuple[Worker, bool]:
    worker = get_worker(session, id)
    changed = session.execute(
        update(Worker)
        .where(Worker.id == id, is_news)  # type: ignore[arg-type]
        .values(drain_requested_at=at)
        .returning(Worker.id)
        .execution_options(synchronize_session=False)
    ).scalar()
    session.refresh(worker)
    return worker, changed is not None


def loads(session: Session, workers: Sequence[Worker]) -> Mapping[str, Load]:
    """What each runs, by its name."""
    found: defaultdict[str, Load] = defaultdict(Load)
    rows = session.execute(
        select(Run.worker, Job.id, Job.project_id, Job.spec)
        .join(Run, and_(Run.job_id == Job.id, Run.fence == Job.fence))
        .where(Job.state == JobState.RUNNING, Run.worker.in_([worker.name for worker in workers]))
        .order_by(Run.started_at, Job.id)
    )
    for name, job_id, project_id, spec in rows:
        need = need_of(spec)
        found[name].jobs.append((job_id, project_id))
        found[name].busy[need.device] += need.count
    return found


def state_of(worker: Worker, load: Load, *, at: datetime) -> WorkerState:
    if worker.lease_expires_at < at:
        return WorkerState.LOST
    if worker.drain_requested_at is None:
        return WorkerState.ACTIVE
    return WorkerState.DRAINING if load.jobs else WorkerState.DRAINED


def announced(session: Session) -> Announced:
    """Of all workers that are neither lost nor drained."""
    slots, gpus, most = session.execute(
        select(func.sum(Worker.slots), func.sum(Worker.gpus), func.max(Worker.gpus)).where(
            Worker.lease_expires_at >= now(session), Worker.drain_requested_at.is_(None)
        )
    ).one()
    return Announced(
        slots={Device.CPU: int(slots or 0), Device.GPU: int(gpus or 0)},
        gpus_together=int(most or 0),
    )
