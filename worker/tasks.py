"""The Celery tasks: shells around the runner and the reconciler."""

from __future__ import annotations

from collections.abc import Callable

from celery import Celery

from jobs.queue import RECONCILE, RUN_JOB
from worker.runner import Runner


def add_tasks(app: Celery, runner: Runner, reconcile: Callable[[], None]) -> None:
    def run_job(job_id: str) -> None:
        runner.offer(job_id)

    def reconcile_now() -> None:
        reconcile()

    app.task(name=RUN_JOB, ignore_result=True)(run_job)
    app.task(name=RECONCILE, ignore_result=True)(reconcile_now)
