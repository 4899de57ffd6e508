"""`python -m worker.scheduler`: the reconciler in a process of its own, which takes no jobs.

Every worker reconciles too, so an installation needs none. Where workers come and go, one of these
keeps queued jobs nudged, lost runs requeued and the store swept, without a machine that trains.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import structlog

from jobs.artifacts import open_store
from jobs.db import Database
from jobs.logs import configure_logging
from jobs.metrics import MetricsServer
from jobs.migrate import SchemaBusy, SchemaTooNew, upgrade_once_reachable
from jobs.nudges import EventPublisher, Teller
from jobs.queue import enqueue_job, make_celery
from jobs.settings import Settings, get_settings
from worker.metrics import WorkerMetrics
from worker.reconciler import reconcile

ALIVE = "alive"

log = structlog.get_logger(__name__)


def reconcile_forever(
    one_pass: Callable[[], object], settings: Settings, stopping: threading.Event
) -> None:
    """Until it is told to stop. The time of the file `alive` in the data folder is when the last
    pass ended, whatever came of it: health checks look at its age."""
    alive = settings.data_dir / ALIVE
    while not stopping.is_set():
        try:
            one_pass()
        except Exception:
            log.exception("the reconciliation failed")
        with suppress(OSError):
            alive.parent.mkdir(parents=True, exist_ok=True)
            alive.touch()
        stopping.wait(settings.reconcile_seconds)


def serve(settings: Settings) -> None:
    """Reconciles until SIGTERM or Ctrl-C."""
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)  # while there is nothing to stop
    publisher = None if settings.redis_url is None else EventPublisher(settings.redis_url)
    teller = Teller(*filter(None, [publisher]))
    database = Database(settings.database_url, after_commit=teller)
    try:
        upgrade_once_reachable(database)
    except (SchemaTooNew, SchemaBusy) as error:
        sys.exit(error.message)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    objects = open_store(settings.store_url, **settings.s3_credentials)
    app = make_celery(settings)
    metrics = WorkerMetrics()
    metrics_server = MetricsServer(
        metrics.registry, host=settings.metrics_host, port=settings.worker_metrics_port
    )

    def one_pass() -> None:
        reconcile(
            settings,
            database,
            objects,
            nudge=lambda job: enqueue_job(app, job.id, job.need.device),
            expired=metrics.lease_expired,
        )

    log.info("scheduler started")
    reconcile_forever(one_pass, settings, stopping)
    metrics_server.close()
    app.close()
    teller.close()
    database.close()
    log.info("scheduler stopped")


def main() -> None:
    settings = get_settings()
    configure_logging(settings)
    serve(settings)
    sys.exit(0)


if __name__ == "__main__":
    main()
