"""Sets right what lost messages and dead workers leave. Safe to run many times at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import structlog
from sqlalchemy.orm import Session

from compression.checkpoint import FOLDER as CHECKPOINTS
from compression.checkpoint import KEPT
from jobs import blobs, deletion, idempotency, resumable, store, webhooks, workers
from jobs.artifacts import ObjectStore, job_prefix, run_prefix
from jobs.db import Database
from jobs.settings import Settings
from jobs.states import JobState, RunState
from jobs.store import QueuedJob
from worker.workspace import remove_leftovers

log = structlog.get_logger(__name__)


def reconcile(
    settings: Settings,
    database: Database,
    objects: ObjectStore,
    *,
    nudge: Callable[[QueuedJob], object],
    expired: Callable[[JobState], object] = lambda now: None,
) -> None:
    """One pass. A step that fails is logged and does not keep the others from being done.

    `nudge` is called with each queued job that some worker could take, `expired` with the
    new state of each whose lease had run out.
    """
    steps: tuple[Callable[[], None], ...] = (
        lambda: _settle_expired(settings, database, expired),
        lambda: _route(database),
        lambda: _nudge_queued(database, nudge),
        lambda: _delete_orphans(settings, database, objects),
        lambda: _delete_spent_checkpoints(settings, database, objects),
        lambda: _forget_idempotency_keys(database),
        lambda: _forget_lost_workers(database),
        lambda: _clean_work_dir(settings),
        lambda: _remove_expired_uploads(settings, database),
        lambda: _end_retention(settings, database),
        lambda: _delete_unused_blobs(settings, database, objects),
        lambda: _sweep_deleted_jobs(settings, database, objects),
        lambda: _forget_deliveries(settings, database),
    )
    for step in steps:
        try:
            step()
        except Exception:
            log.exception("a step of the reconciliation failed")


def _settle_expired(
    settings: Settings, database: Database, expired: Callable[[JobState], object]
) -> None:
    with database.reading() as session:
        found = store.expired_jobs(session)
    for job_id in found:
        with database.transaction() as session:
            state = store.settle_expired(session, job_id, max_runs=settings.max_runs)
        if state is not None:
            expired(state)
            log.warning("a run's lease expired", job=job_id, now=state.value)


def _route(database: Database) -> None:
    with database.reading() as session:
        unrouted = store.unrouted_jobs(session)
    for job_id in unrouted:
        with database.transaction() as session:
            store.route_job(session, job_id)


def _nudge_queued(database: Database, nudge: Callable[[QueuedJob], object]) -> None:
    """Not of devices that nobody has now: messages would pile up in a queue without readers."""
    with database.reading() as session:
        there = [device for device, slots in workers.announced(session).slots.items() if slots]
        queued = store.queued_jobs(session, devices=there)
    for job in queued:
        nudge(job)


def _delete_orphans(settings: Settings, database: Database, objects: ObjectStore) -> None:
    """Objects that no record names: all of a run that came to nothing (artifacts are recorded
    together with their run's success), and checkpoints that a run could not record."""
    with database.reading() as session:
        runs = store.unswept_runs(session, grace_seconds=settings.orphan_grace_seconds)
    for run in runs:
        prefix = run_prefix(run.job_id, run.fence)
        if run.state == RunState.SUCCEEDED:
            prefix += f"{CHECKPOINTS}/"
        with database.reading() as session:
            named = set(store.checkpoint_keys(session, run.job_id))
        orphans = [key for key in objects.keys(prefix) if key not in named]
        objects.delete(orphans)
        objects.delete_drafts(prefix)
        with database.transaction() as session:
            store.mark_swept(session, run.id)
        if orphans:
            log.info("orphaned objects deleted", job=run.job_id, run=run.id, objects=len(orphans))


def _delete_spent_checkpoints(settings: Settings, database: Database, objects: ObjectStore) -> None:
    with database.reading() as session:
        spent = store.spent_checkpoints(
            session, kept=KEPT, grace_seconds=settings.orphan_grace_seconds
        )
    for job_id, keys in spent.items():
        objects.delete(keys)
        with database.transaction() as session:
            store.forget_checkpoints(session, job_id, keys)
        log.info("spent checkpoints deleted", job=job_id, objects=len(keys))


def _in_portions(database: Database, delete: Callable[[Session], int]) -> int:
    """How many went. More may expire between two passes than one transaction should delete."""
    gone = 0
    while True:
        with database.transaction() as session:
            portion = delete(session)
        if portion == 0:
            return gone
        gone += portion


def _forget_idempotency_keys(database: Database) -> None:
    if forgotten := _in_portions(database, idempotency.delete_expired):
        log.info("idempotency keys forgotten", keys=forgotten)


def _forget_lost_workers(database: Database) -> None:
    with database.transaction() as session:
        if forgotten := workers.forget_lost(session):
            log.info("lost workers forgotten", workers=forgotten)


def _clean_work_dir(settings: Settings) -> None:
    for run_id in remove_leftovers(settings.work_dir):
        log.info("a dead run's folder removed", run=run_id)


def _remove_expired_uploads(settings: Settings, database: Database) -> None:
    removed = resumable.remove_expired(database, settings.data_dir)
    if removed:
        log.info("expired uploads removed", uploads=removed)


def _end_retention(settings: Settings, database: Database) -> None:
    if settings.retention_days == 0:
        return
    for each in deletion.delete_past_retention(database, days=settings.retention_days):
        log.info("retention ended", kind=each.kind, id=each.id, size_bytes=each.size_bytes)


def _delete_unused_blobs(settings: Settings, database: Database, objects: ObjectStore) -> None:
    grace = settings.orphan_grace_seconds
    with database.reading() as session:
        unused = blobs.unused(session, grace_seconds=grace)
    for blob in unused:
        with database.transaction() as session:
            if not blobs.doom(session, blob, grace_seconds=grace):
                continue  # it has come into use
        objects.delete([blob.key])
        objects.delete_drafts(blob.key)
        with database.transaction() as session:
            blobs.forget(session, blob.id)
    if unused:
        log.info("unused objects deleted", objects=len(unused))


def _sweep_deleted_jobs(settings: Settings, database: Database, objects: ObjectStore) -> None:
    with database.reading() as session:
        deleted = store.unswept_deleted_jobs(session, grace_seconds=settings.orphan_grace_seconds)
    for job in deleted:
        prefix = job_prefix(job.id)
        gone = objects.delete_prefix(prefix) + objects.delete_drafts(prefix)
        with database.transaction() as session:
            store.forget_deleted_job(session, job)
        log.info("a deleted job's objects deleted", job=job.id, objects=gone)


def _forget_deliveries(settings: Settings, database: Database) -> None:
    older_than = settings.webhook_log_seconds
    if gone := _in_portions(
        database, partial(webhooks.delete_old_deliveries, older_than_seconds=older_than)
    ):
        log.info("old deliveries of webhooks forgotten", deliveries=gone)
