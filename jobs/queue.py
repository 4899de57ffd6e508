"""The queue: Celery on a folder or on Redis. Nothing else in the project knows Celery's settings.

A message is a nudge that carries a job's id. The database is the truth, so a message that
is lost, late, redelivered or dropped does no harm: the reconciler nudges again.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from queue import Empty
from typing import Any

import structlog
from celery import Celery
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError
from kombu.transport import filesystem
from kombu.utils.json import dumps, loads

from jobs.devices import Device
from jobs.settings import Settings

RUN_JOB = "widthwise.run_job"
RECONCILE = "widthwise.reconcile"
DELIVER_WEBHOOK = "widthwise.deliver_webhook"
QUEUE = "widthwise"  # what any worker may take; also where versions with one queue send jobs


def queue_of(device: Device) -> str:
    return f"{QUEUE}-{device}"


QUEUES = (QUEUE, *(queue_of(device) for device in Device))

log = structlog.get_logger(__name__)


class _FolderChannel(filesystem.Channel):
    """Kombu's folder queue with whole messages only, and none of them outside the folder.

    Kombu's own writes a message in place, where a consumer may meet it half written, and
    moves a message that it takes through the system's folder for temporary files.
    """

    def _put(self, queue: str, payload: Any, **_: Any) -> None:
        name = f"{time.time_ns():020d}_{uuid.uuid4().hex}.{queue}.msg"
        draft = self._taken / f"{name}.new"
        draft.write_text(dumps(payload), encoding="utf-8")
        draft.rename(self._waiting / name)

    def _get(self, queue: str) -> Any:
        for waiting in sorted(self._waiting.glob(f"*.{queue}.msg")):
            taken = self._taken / waiting.name
            try:
                waiting.rename(taken)
            except FileNotFoundError:
                continue  # another worker was faster
            payload = taken.read_text(encoding="utf-8")
            taken.unlink()
            return loads(payload)
        raise Empty()

    @property
    def _waiting(self) -> Path:
        return Path(self.data_folder_in)

    @property
    def _taken(self) -> Path:
        return Path(self.processed_folder)


class FolderTransport(filesystem.Transport):
    Channel = _FolderChannel


def make_celery(settings: Settings) -> Celery:
    """A Celery application for this process; the worker adds the tasks."""
    app = Celery("widthwise", set_as_current=False)
    app.conf.update(
        broker_url=settings.broker_url,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # a worker outlives any outage of its queue
        broker_connection_timeout=3,
        # The default exchange names the queue itself, so there are no bindings to keep.
        task_queues=[Queue(name, Exchange(""), routing_key=name) for name in QUEUES],
        task_default_queue=QUEUE,
        task_default_exchange="",
        task_default_routing_key=QUEUE,
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_acks_late=False,
        task_publish_retry=False,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=True,  # there are none; no warning
        enable_utc=True,
    )
    if settings.broker_url.startswith("filesystem:"):
        folders = {name: settings.data_dir / "broker" / name for name in ("waiting", "taken")}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        app.conf.update(
            broker_url="filesystem://localhost",  # a host, or kombu warns that there is none
            broker_transport="jobs.queue:FolderTransport",
            broker_transport_options={
                "data_folder_in": str(folders["waiting"]),
                "data_folder_out": str(folders["waiting"]),
                "processed_folder": str(folders["taken"]),
                "control_folder": str(settings.data_dir / "broker" / "control"),
                "polling_interval": 0.2,
            },
        )
    else:
        app.conf.broker_transport_options = {
            "socket_connect_timeout": 3,
            "socket_timeout": 10,
        }
    return app


def enqueue_job(app: Celery, job_id: str, device: Device = Device.CPU) -> bool:
    """Nudges the workers that have the device. False if the queue cannot be reached now: the job
    waits in the database until the next reconciliation."""
    return _send(app, RUN_JOB, job_id, queue_of(device))


def enqueue_delivery(app: Celery, delivery_id: str) -> bool:
    """The same for a webhook's delivery, which any worker may make."""
    return _send(app, DELIVER_WEBHOOK, delivery_id, QUEUE)


def _send(app: Celery, task: str, id: str, queue: str) -> bool:
    try:
        app.send_task(task, args=[id], queue=queue)
    except (OperationalError, OSError) as error:
        log.warning("the queue cannot be reached", task=task, id=id, error=str(error))
        return False
    return True
