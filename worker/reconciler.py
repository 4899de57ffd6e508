"""Sets right what lost messages and dead workers leave. Safe to run many times at once."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from jobs import store
from jobs.artifacts import ObjectStore, run_prefix
from jobs.db import Database
from jobs.settings import Settings
from worker.workspace import remove_leftovers

log = structlog.get_logger(__name__)


def reconcile(
    settings: Settings,
    database: Database,
    objects: ObjectStore,
    *,
    nudge: Callable[[str], object],
) -> None:
    """One pass. A step that fails is logged and does not keep the others from being done.

    `nudge` is called with the id of each queued job.
    """
    steps: tuple[Callable[[], None], ...] = (
        lambda: _settle_expired(settings, database),
        lambda: _nudge_queued(database, nudge),
        lambda: _delete_orphans(settings, database, objects),
        lambda: _clean_work_dir(settings),
    )
    for step in steps:
        try:
            step()
        except Exception:
            log.exception("a step of the reconciliation failed")


def _settle_expired(settings: Settings, database: Database) -> None:
    with database.reading() as session:
        expired = store.expired_jobs(session)
    for job_id in expired:
        with database.transaction() as session:
            state = store.settle_expired(session, job_id, max_runs=settings.max_runs)
        if state is not None:
            log.warning("a run's lease expired", job=job_id, now=state.value)


def _nudge_queued(database: Database, nudge: Callable[[str], object]) -> None:
    with database.reading() as session:
        queued = store.queued_jobs(session)
    for job_id in queued:
        nudge(job_id)


def _delete_orphans(settings: Settings, database: Database, objects: ObjectStore) -> None:
    """Objects of runs that came to nothing. No record names them: artifacts are recorded
    together with their run's success."""
    with database.reading() as session:
        runs = store.unswept_runs(session, grace_seconds=settings.orphan_grace_seconds)
    for run in runs:
        deleted = objects.delete_prefix(run_prefix(run.job_id, run.fence))
        with database.transaction() as session:
            store.mark_swept(session, run.id)
        if deleted:
            log.info("orphaned objects deleted", job=run.job_id, run=run.id, objects=deleted)


def _clean_work_dir(settings: Settings) -> None:
    for run_id in remove_leftovers(settings.work_dir):
        log.info("a dead run's folder removed", run=run_id)
