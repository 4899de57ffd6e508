"""The deliverer of a worker: what it sends, at once and again, and in whose way it never is."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_network
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from jobs import access, store, webhooks
from jobs.artifacts import ObjectStore
from jobs.db import Database
from jobs.records import DEFAULT_PROJECT, WebhookDelivery
from jobs.settings import Settings
from jobs.states import DeliveryState
from jobs.webhooks import JOB_ENDS, Attempt, Outcome, WebhookEvent
from tests.receiver import Receiver, receiving, with_status
from tests.seeds import seed_job
from tests.services import wait_until
from tests.worker.helpers import settings_for, submit, wait_for_state
from tests.worker.worker_process import Worker
from worker.webhook_sender import Sender
from worker.webhooks import PER_PROJECT, PER_WEBHOOK, Deliverer

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
LOOPBACK = (ip_network("127.0.0.0/8"),)
SECRET = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz"
MakeDeliverer = Callable[..., Deliverer]


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return settings_for(tmp_path, database_url, reconcile_seconds=600)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture
def make_deliverer(settings: Settings, database: Database) -> Iterator[MakeDeliverer]:
    made = []

    def make(send: Callable[[Attempt], Outcome] | None = None) -> Deliverer:
        send = send or Sender(10, LOOPBACK).send
        made.append(Deliverer(settings, database, send))
        made[-1].start()
        return made[-1]

    yield make
    for deliverer in made:
        deliverer.stop()
        deliverer.join(30)


def add(database: Database, url: str, *events: WebhookEvent) -> str:
    with database.transaction() as session:
        return webhooks.add_webhook(
            session,
            project_id=DEFAULT_PROJECT,
            url=url,
            events=events or JOB_ENDS,
            secret=SECRET,
        ).id


def cancelled_job(database: Database) -> str:
    job_id = seed_job(database)
    with database.transaction() as session:
        store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)
    return job_id


def log_of(database: Database, webhook_id: str) -> list[WebhookDelivery]:
    with database.reading() as session:
        return webhooks.list_deliveries(session, webhook_id, project_id=DEFAULT_PROJECT, limit=200)


def states_of(database: Database, webhook_id: str) -> set[DeliveryState]:
    return {delivery.state for delivery in log_of(database, webhook_id)}


def test_what_is_due_is_sent_once_by_many_workers(
    database: Database, receiver: Receiver, make_deliverer: MakeDeliverer
) -> None:
    webhook_id = add(database, f"http://127.0.0.1:{receiver.port}/")
    jobs = {cancelled_job(database) for _ in range(6)}
    deliverers = [make_deliverer() for _ in range(3)]
    for deliverer in deliverers:
        deliverer.offer("dlv_any")
    wait_until(
        lambda: states_of(database, webhook_id) == {DeliveryState.DELIVERED}, "all is delivered"
    )
    told = [Webhook(SECRET).verify(each.body, each.headers) for each in receiver.requests]
    assert sorted(each["data"]["job"] for each in told) == sorted(jobs)
    assert {each.headers["webhook-id"] for each in receiver.requests} == {
        delivery.id for delivery in log_of(database, webhook_id)
    }


@ON_SQLITE
def test_a_failure_is_tried_again_by_itself_when_its_time_comes(
    database: Database,
    receiver: Receiver,
    make_deliverer: MakeDeliverer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(webhooks, "RETRY_SECONDS", (0.2, 0.2, 0.2))
    answers = iter([500, 503, 200])
    receiver.answer = lambda handler: with_status(next(answers))(handler)
    webhook_id = add(database, f"http://127.0.0.1:{receiver.port}/")
    cancelled_job(database)
    make_deliverer()
    wait_until(
        lambda: states_of(database, webhook_id) == {DeliveryState.DELIVERED}, "it has arrived"
    )
    (delivery,) = log_of(database, webhook_id)
    assert [each["status"] for each in delivery.attempts] == [500, 503, 200]
    assert {each.headers["webhook-id"] for each in receiver.requests} == {delivery.id}


@ON_SQLITE
def test_a_slow_endpoint_holds_up_no_other(
    database: Database, receiver: Receiver, make_deliverer: MakeDeliverer
) -> None:
    go_on = threading.Event()
    waiting: list[str] = []

    def slow(handler: BaseHTTPRequestHandler) -> None:
        waiting.append(handler.path)
        go_on.wait(60)
        with_status(204)(handler)

    with receiving() as stuck:
        stuck.answer = slow
        slow_id = add(database, f"http://127.0.0.1:{stuck.port}/")
        for _ in range(10):
            cancelled_job(database)
        deliverer = make_deliverer()
        wait_until(lambda: len(waiting) == PER_WEBHOOK, "it waits as often as it may")
        quick_id = add(database, f"http://127.0.0.1:{receiver.port}/")
        cancelled_job(database)
        deliverer.offer()
        wait_until(
            lambda: states_of(database, quick_id) == {DeliveryState.DELIVERED}, "others go on"
        )
        assert len(waiting) == PER_WEBHOOK < PER_PROJECT
        go_on.set()
        wait_until(
            lambda: states_of(database, slow_id) == {DeliveryState.DELIVERED}, "all the rest"
        )


@ON_SQLITE
def test_an_endpoint_that_is_gone_is_disabled_with_a_line_in_the_audit_log(
    database: Database, receiver: Receiver, make_deliverer: MakeDeliverer
) -> None:
    receiver.answer = with_status(410)
    webhook_id = add(database, f"http://127.0.0.1:{receiver.port}/")
    cancelled_job(database)
    make_deliverer()
    wait_until(lambda: states_of(database, webhook_id) == {DeliveryState.FAILED}, "it is over")
    with database.reading() as session:
        (entry,) = access.list_actions(session, project_id=DEFAULT_PROJECT, target=webhook_id)
    assert (entry.action, entry.key_id) == ("webhook.disabled", None)
    assert entry.details == {"reason": "Its endpoint answered 410 Gone."}


@ON_SQLITE
def test_a_fault_of_ours_costs_that_attempt_alone(
    database: Database, make_deliverer: MakeDeliverer
) -> None:
    sent: list[str] = []

    def broken_at_first(attempt: Attempt) -> Outcome:
        sent.append(attempt.delivery_id)
        if len(sent) == 1:
            raise RuntimeError("a fault")
        return Outcome(204, None, 1)

    webhook_id = add(database, "http://127.0.0.1:1024/")
    cancelled_job(database)
    deliverer = make_deliverer(broken_at_first)
    wait_until(lambda: len(sent) == 1, "the first is lost")
    cancelled_job(database)
    deliverer.offer()
    wait_until(lambda: len(sent) == 2, "the next is sent")
    wait_until(
        lambda: states_of(database, webhook_id) == {DeliveryState.DELIVERED, DeliveryState.PENDING},
        "the first waits for the end of its claim",
    )


def test_a_worker_tells_the_end_of_what_it_ran(
    settings: Settings,
    database: Database,
    objects: ObjectStore,
    receiver: Receiver,
    tmp_path: Path,
) -> None:
    """The whole way, in a process of its own: claim, run, commit, call."""
    add(
        database,
        f"http://127.0.0.1:{receiver.port}/hook",
        WebhookEvent.JOB_STARTED,
        WebhookEvent.JOB_SUCCEEDED,
    )
    job_id = submit(database, objects, "progress")
    worker = Worker(
        settings.model_copy(update={"webhook_allowed_networks": LOOPBACK}),
        tmp_path / "worker",
        program=["-m", "tests.worker.run_worker"],
    )
    try:
        wait_for_state(database, job_id, "succeeded")
        wait_until(lambda: len(receiver.requests) == 2, "both are told")
        assert worker.stop() == 0, worker.log.read_text()
    finally:
        worker.process.kill()
        worker.process.wait()
    told = {json.loads(each.body)["type"]: json.loads(each.body) for each in receiver.requests}
    assert set(told) == {"job.started", "job.succeeded"}
    assert told["job.succeeded"]["data"]["job"] == job_id
    assert SECRET not in worker.log.read_text()
