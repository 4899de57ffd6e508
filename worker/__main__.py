"""`python -m worker`: one worker, until SIGTERM or Ctrl-C.

The reconciler is a plain thread of every worker and no Celery beat: it needs no schedule
file and no single beat process, and it still takes queued jobs when the queue is away.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import warnings
from types import FrameType
from typing import Any

import structlog
from celery import signals
from celery.apps.worker import Worker as WorkerProgram
from celery.platforms import SecurityWarning

from compression.errors import SigningKeyRefused
from compression.signing import read_private_key
from jobs.artifacts import open_store
from jobs.db import Database
from jobs.logs import configure_logging
from jobs.metrics import MetricsServer
from jobs.migrate import upgrade
from jobs.nudges import EventPublisher, Teller
from jobs.queue import enqueue_job, make_celery
from jobs.settings import Settings, get_settings
from worker.environment import measured
from worker.metrics import WorkerMetrics
from worker.reconciler import reconcile
from worker.runner import CHILD_COMMAND, Runner
from worker.tasks import add_tasks
from worker.webhook_sender import Sender
from worker.webhooks import Deliverer

_STOP_SECONDS = 12.0  # under the 15 within which whoever stops us may expect the end

log = structlog.get_logger(__name__)


def serve(settings: Settings, child_command: tuple[str, ...] = CHILD_COMMAND) -> int:
    """Works until it is told to stop; the process's exit status."""
    signal.signal(signal.SIGTERM, _exit)  # until Celery sets its own
    try:
        key = signing_key(settings)
    except (OSError, ValueError, SigningKeyRefused) as error:
        log.error("WIDTHWISE_SIGNING_KEY cannot be used", error=str(error))
        return 1
    try:
        training = measured(settings)
    except (KeyboardInterrupt, SystemExit):
        return 0
    worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    metrics = WorkerMetrics()
    publisher = None if settings.redis_url is None else EventPublisher(settings.redis_url)
    teller = Teller(
        *filter(None, [publisher]), lambda notes: deliverer.offer() if notes.deliveries else None
    )
    database = Database(settings.database_url, after_commit=teller)
    upgrade(database)
    deliverer = Deliverer(
        settings,
        database,
        Sender(settings.webhook_timeout_seconds, settings.webhook_allowed_networks).send,
        metrics,
    )
    objects = open_store(settings.store_url)
    app = make_celery(settings)
    runner = Runner(
        settings,
        database,
        objects,
        worker=worker,
        child_command=child_command,
        training=training,
        signing_key=key,
        metrics=metrics,
    )
    stopping = threading.Event()

    def reconcile_now() -> None:
        reconcile(
            settings,
            database,
            objects,
            nudge=lambda job_id: enqueue_job(app, job_id),
            expired=metrics.lease_expired,
        )
        runner.fill()
        deliverer.offer()

    def reconcile_forever() -> None:
        while not stopping.is_set():
            try:
                reconcile_now()
            except Exception:
                log.exception("the reconciliation failed")
            stopping.wait(settings.reconcile_seconds)

    def begin_to_stop(**_: Any) -> None:
        stopping.set()
        runner.stop()
        deliverer.stop()
        # Whatever then hangs (a silent database, a silent queue), the process ends; the
        # kernel kills the children, and the leases hand the jobs to other workers.
        last_resort = threading.Timer(_STOP_SECONDS, os._exit, args=(1,))
        last_resort.daemon = True
        last_resort.start()

    # It warns root against pickled messages; ours are JSON, and name a job at most.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    add_tasks(app, runner, reconcile_now, deliverer)
    signals.worker_shutting_down.connect(begin_to_stop, weak=False)
    signals.setup_logging.connect(_keep_our_logging)
    reconciler = threading.Thread(target=reconcile_forever, name="reconciler", daemon=True)
    metrics_server = MetricsServer(
        metrics.registry, host=settings.metrics_host, port=settings.worker_metrics_port
    )
    try:
        reconciler.start()
        deliverer.start()
        log.info("worker started", worker=worker, slots=settings.worker_slots)
        # Tasks only hand a job to the runner's own threads, so two are plenty.
        celery_worker = _CeleryWorker(
            app=app,
            hostname=worker,
            pool="threads",
            concurrency=2,
            quiet=True,
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
        )
        celery_worker.start()
        # Celery calls it a failure to be stopped by Ctrl-C.
        status = 0 if stopping.is_set() else int(celery_worker.exitcode or 0)
    except (KeyboardInterrupt, SystemExit):
        status = 0
    finally:
        if not stopping.is_set():
            begin_to_stop()
        runner.join(_STOP_SECONDS)
        metrics_server.close()
        teller.close()
        deliverer.join(1.0)
        database.close()
        log.info("worker stopped", worker=worker)
    return status


class _CeleryWorker(WorkerProgram):  # type: ignore[misc]
    def install_platform_tweaks(self, worker: Any) -> None:
        super().install_platform_tweaks(worker)
        # Celery would start its own program anew, which this is not.
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))


def signing_key(settings: Settings) -> str | None:
    """The PEM that the setting names, checked now and not at a job's end; None without one."""
    if settings.signing_key is None:
        return None
    pem = settings.signing_key.read_text(encoding="ascii")
    read_private_key(pem.encode())
    return pem


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _keep_our_logging(**_: Any) -> None:
    """Celery sets up its own logs unless somebody answers this signal."""


def main() -> None:
    settings = get_settings()
    configure_logging(settings)
    sys.exit(serve(settings))


if __name__ == "__main__":
    main()
