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
from collections.abc import Callable
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
from jobs.migrate import SchemaBusy, SchemaTooNew, upgrade_once_reachable
from jobs.nudges import EventPublisher, Teller
from jobs.queue import QUEUE, enqueue_job, make_celery, queue_of
from jobs.settings import Settings, get_settings
from jobs.store import QueuedJob
from worker.environment import measured
from worker.gpus import offered_gpus
from worker.metrics import WorkerMetrics
from worker.presence import Presence
from worker.reconciler import reconcile
from worker.runner import CHILD_COMMAND, Runner
from worker.scheduler import reconcile_forever
from worker.tasks import add_tasks
from worker.webhook_sender import Sender
from worker.webhooks import Deliverer

_LAST_WORDS_SECONDS = 2.0  # for the last resort, which may meet a silent database

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
    gpus = offered_gpus(settings)
    if settings.worker_slots == 0 and not gpus:
        log.error(
            "this worker has nothing to offer: WIDTHWISE_WORKER_SLOTS is 0, and it has no GPU"
        )
        return 1
    worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    metrics = WorkerMetrics()
    publisher = None if settings.redis_url is None else EventPublisher(settings.redis_url)
    teller = Teller(
        *filter(None, [publisher]), lambda notes: deliverer.offer() if notes.deliveries else None
    )
    database = Database(settings.database_url, after_commit=teller)
    try:
        upgrade_once_reachable(database)
    except (SchemaTooNew, SchemaBusy) as error:
        log.error(error.message)
        return 1
    except (KeyboardInterrupt, SystemExit):
        return 0
    deliverer = Deliverer(
        settings,
        database,
        Sender(settings.webhook_timeout_seconds, settings.webhook_allowed_networks).send,
        metrics,
    )
    objects = open_store(settings.store_url, **settings.s3_credentials)
    app = make_celery(settings)
    runner = Runner(
        settings,
        database,
        objects,
        worker=worker,
        child_command=child_command,
        gpus=gpus,
        training=training,
        signing_key=key,
        metrics=metrics,
    )
    stopping = threading.Event()

    def nudge(job: QueuedJob) -> None:
        enqueue_job(app, job.id, job.need.device)

    def reconcile_now() -> None:
        reconcile(settings, database, objects, nudge=nudge, expired=metrics.lease_expired)
        runner.fill()
        deliverer.offer()

    def give_up() -> None:
        log.error("not stopped in time: the jobs are handed back without their last checkpoints")
        runner.hand_back()
        presence.end()
        os._exit(1)

    def begin_to_stop(**_: Any) -> None:
        stopping.set()
        runner.stop()
        deliverer.stop()
        # Whatever then hangs (a child, an upload, a silent queue), the process ends; the kernel
        # kills the children. Where the database hangs too, leases hand the jobs to others.
        _after(settings.worker_stop_seconds + _LAST_WORDS_SECONDS, lambda: os._exit(1))
        _after(settings.worker_stop_seconds, give_up)

    # It warns root against pickled messages; ours are JSON, and name a job at most.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    add_tasks(app, runner, reconcile_now, deliverer)
    signals.worker_shutting_down.connect(begin_to_stop, weak=False)
    signals.setup_logging.connect(_keep_our_logging)
    presence = Presence(
        database,
        name=worker,
        slots=settings.worker_slots,
        gpus=len(gpus),
        lease_seconds=settings.lease_seconds,
    )
    reconciler = threading.Thread(
        target=reconcile_forever,
        args=(reconcile_now, settings, stopping),
        name="reconciler",
        daemon=True,
    )
    metrics_server = MetricsServer(
        metrics.registry, host=settings.metrics_host, port=settings.worker_metrics_port
    )
    try:
        presence.start()
        reconciler.start()
        deliverer.start()
        log.info("worker started", worker=worker, slots=settings.worker_slots, gpus=len(gpus))
        # Tasks only hand a job to the runner's own threads, so two are plenty.
        celery_worker = _CeleryWorker(
            app=app,
            hostname=worker,
            queues=[QUEUE, *(queue_of(device) for device in runner.devices)],
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
        runner.join(settings.worker_stop_seconds)
        presence.end()
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


def _after(seconds: float, act: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()


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
