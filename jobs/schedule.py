"""Where a queued job stands, and when it may start.

The estimate is what the plans predict for the jobs before it, or their time limits where these are
shorter, corrected by what the last jobs on this device took against their own predictions, and
shared out to the slots that workers announce. It takes a job of several GPUs for one of one. Unless
all that is known, nothing is said.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median

from sqlalchemy import and_, case, select
from sqlalchemy.orm import Session

from jobs import workers
from jobs.db import now
from jobs.devices import Device, need_of
from jobs.records import Job, Run
from jobs.states import JobState

COUNTED = 1000  # jobs ahead that are looked at; further back there is neither place nor time
MEASURED = 20  # ended jobs whose times are taken
HORIZON = timedelta(days=3650)  # what would start later is not known to start at all
_EXPECTED = case(
    (Job.time_limit_seconds < Job.predicted_seconds, Job.time_limit_seconds),
    else_=Job.predicted_seconds,
)


@dataclass(frozen=True)
class Outlook:
    """`position` counts from 1, and is None behind more than `COUNTED` jobs; `warning` says why
    the job would wait without an end, as things are."""

    device: Device
    position: int | None
    estimated_start: datetime | None
    warning: str | None


def outlook(session: Session, job: Job) -> Outlook | None:
    """None for a job that is not queued."""
    if job.state != JobState.QUEUED:
        return None
    need = need_of(job.spec)
    announced = workers.announced(session)
    missing = announced.missing(need)
    warning = None if missing is None else f"{missing} The job waits until one does."
    ahead = _ahead(session, need.device, job)
    if len(ahead) > COUNTED:
        return Outlook(need.device, None, None, warning)
    return Outlook(
        need.device,
        position=len(ahead) + 1,
        estimated_start=None
        if warning
        else _estimated_start(session, need.device, announced.slots[need.device], ahead),
        warning=warning,
    )


def _ahead(session: Session, device: Device, job: Job) -> list[float | None]:
    """Expected seconds of the jobs before it, in their order; COUNTED + 1 of them at most."""
    queued = select(_EXPECTED).where(Job.state == JobState.QUEUED, Job.device == device)
    parts = (
        queued.where(Job.precedence < job.precedence),
        queued.where(Job.precedence == job.precedence, Job.created_at < job.created_at),
        queued.where(
            Job.precedence == job.precedence, Job.created_at == job.created_at, Job.id < job.id
        ),
    )
    found: list[float | None] = []
    for part in parts:  # each is one range of the queue's index
        ordered = part.order_by(Job.precedence, Job.created_at, Job.id)
        found += session.scalars(ordered.limit(COUNTED + 1 - len(found)))
    return found


def _estimated_start(
    session: Session, device: Device, slots: int, ahead: Sequence[float | None]
) -> datetime | None:
    at = now(session)
    running = session.execute(
        select(_EXPECTED, Run.started_at)
        .join(Run, and_(Run.job_id == Job.id, Run.fence == Job.fence))
        .where(Job.state == JobState.RUNNING, Job.device == device)
    ).all()
    if not ahead and len(running) < slots:
        return at
    pace = _pace(session, device)
    expected = [seconds for seconds in (*(each[0] for each in running), *ahead) if seconds]
    if pace is None or len(expected) < len(running) + len(ahead):
        return None
    left = [
        max(0.0, pace * seconds - (at - started_at).total_seconds())
        for seconds, (_, started_at) in zip(expected, running, strict=False)
    ]
    waits = wait_seconds(slots, left, (pace * seconds for seconds in expected[len(running) :]))
    return None if waits > HORIZON.total_seconds() else at + timedelta(seconds=waits)


def wait_seconds(slots: int, running: Sequence[float], ahead: Iterable[float]) -> float:
    """When a slot is free for the job behind `ahead` (seconds that each takes), if each goes to the
    slot that is free first. `running`: seconds that those in progress still take."""
    ends = heapq.nlargest(slots, running)  # where more run than there are slots, those count
    ends += [0.0] * (slots - len(ends))
    heapq.heapify(ends)
    for seconds in ahead:
        heapq.heapreplace(ends, ends[0] + seconds)
    return ends[0]


def _pace(session: Session, device: Device) -> float | None:
    """Measured over predicted seconds: the median of the device's last jobs that succeeded."""
    last = session.execute(
        select(Job.started_at, Job.finished_at, Job.predicted_seconds)
        .where(Job.state == JobState.SUCCEEDED, Job.device == device)
        .order_by(Job.finished_at.desc())
        .limit(MEASURED)
    )
    ratios = [
        (finished_at - started_at).total_seconds() / predicted
        for started_at, finished_at, predicted in last
        if started_at is not None and finished_at is not None and predicted
    ]
    return median(ratios) if ratios else None
