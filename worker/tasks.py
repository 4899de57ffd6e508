"""The Celery tasks: shells around the runner, the reconciler and the deliverer of webhooks."""

from __future__ import annotations

from collections.abc import Callable

from celery import Celery

from jobs.queue import DELIVER_WEBHOOK, RECONCILE, RUN_JOB
from worker.runner import Runner
from worker.webhooks import Deliverer


def add_tasks(
    app: Celery, runner: Runner, reconcile: Callable[[], None], deliverer: Deliverer
) -> None:
    def run_job(job_id: str) -> None:
        runner.offer(job_id)

    def reconcile_now() -> None:
        reconcile()

    def deliver_webhook(delivery_id: str) -> None:
        deliverer.offer(delivery_id)

    app.task(name=RUN_JOB, ignore_result=True)(run_job)
    app.task(name=RECONCILE, ignore_result=True)(reconcile_now)
    app.task(name=DELIVER_WEBHOOK, ignore_result=True)(deliver_webhook)
