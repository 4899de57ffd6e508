"""Webhooks and their deliveries: written with the event, claimed once, tried again, disabled."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from jobs import store, webhooks
from jobs.db import Database, now
from jobs.errors import Conflict, NotFound
from jobs.nudges import Notes
from jobs.records import DEFAULT_PROJECT, WebhookDelivery
from jobs.states import DeliveryState, JobState
from jobs.webhooks import JOB_ENDS, RETRY_SECONDS, Attempt, Outcome, WebhookEvent
from tests.seeds import seed_job

DAY = 86400.0
OK = Outcome(204, None, 3)
DOWN = Outcome(None, "no connection", 3)


def add(database: Database, *events: WebhookEvent, project_id: str = DEFAULT_PROJECT) -> str:
    with database.transaction() as session:
        return webhooks.add_webhook(
            session,
            project_id=project_id,
            url="https://hooks.example/x",
            events=events or JOB_ENDS,
            secret="whsec_c2VjcmV0",
        ).id


def cancel(database: Database, job_id: str) -> None:
    with database.transaction() as session:
        store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)


def claim(database: Database, **busy: list[str]) -> Attempt | None:
    with database.transaction() as session:
        return webhooks.claim_delivery(session, **busy)


def claimed(database: Database) -> Attempt:
    attempt = claim(database)
    assert attempt is not None
    return attempt


def record(
    database: Database, attempt: Attempt, outcome: Outcome, disable_seconds: float = DAY
) -> str | None:
    with database.transaction() as session:
        return webhooks.record_attempt(session, attempt, outcome, disable_seconds=disable_seconds)


def deliveries(database: Database, webhook_id: str) -> list[WebhookDelivery]:
    with database.reading() as session:
        return webhooks.list_deliveries(session, webhook_id, project_id=DEFAULT_PROJECT)


def make_due(database: Database) -> None:
    """As if the time until the next attempt were over."""
    with database.transaction() as session:
        session.execute(
            update(WebhookDelivery)
            .where(WebhookDelivery.next_attempt_at.is_not(None))
            .values(next_attempt_at=now(session))
        )


def test_an_event_is_told_to_those_who_want_it_and_notes_what_is_due(database: Database) -> None:
    ends, starts = add(database), add(database, WebhookEvent.JOB_QUEUED)
    add(database, WebhookEvent.JOB_STARTED)
    told: list[Notes] = []
    telling = Database(
        database.engine.url.render_as_string(hide_password=False), after_commit=told.append
    )
    job_id = seed_job(telling)
    (queued,) = deliveries(database, starts)
    assert (queued.event, queued.job_id, queued.event_number) == ("job.queued", job_id, 1)
    assert queued.state == DeliveryState.PENDING
    assert deliveries(database, ends) == []
    cancel(telling, job_id)
    (ended,) = deliveries(database, ends)
    assert [notes.deliveries for notes in told] == [{queued.id}, {ended.id}]
    telling.close()


def test_an_event_that_is_taken_back_takes_its_deliveries_along(database: Database) -> None:
    webhook_id = add(database)
    job_id = seed_job(database)
    with pytest.raises(ZeroDivisionError), database.transaction() as session:
        store.request_cancel(session, job_id, project_id=DEFAULT_PROJECT)
        raise ZeroDivisionError
    assert deliveries(database, webhook_id) == []


def test_another_project_is_told_nothing(database: Database) -> None:
    from jobs import access

    with database.transaction() as session:
        other = access.add_project(session, name="other").id
    webhook_id = add(database, project_id=other)
    cancel(database, seed_job(database))
    assert claim(database) is None
    with database.reading() as session:
        with pytest.raises(NotFound):
            webhooks.list_deliveries(session, webhook_id, project_id=DEFAULT_PROJECT)
        assert webhooks.list_deliveries(session, webhook_id, project_id=other) == []


def test_a_message_says_what_happened_and_quotes_no_rows(database: Database) -> None:
    add(database)
    job_id = seed_job(database)
    with database.transaction() as session:
        run = store.claim_job(session, job_id, worker="w", lease_seconds=60, max_runs=3)
        assert run is not None
        error = {"code": "bad-row", "message": "A row is bad.", "rows": [{"message": "private"}]}
        store.finish_job(session, run, JobState.FAILED, error=error)
    message = json.loads(claimed(database).body)
    assert message["type"] == "job.failed"
    assert message["timestamp"].endswith("+00:00")
    assert message["data"] == {
        "job": job_id,
        "name": "job",
        "project": DEFAULT_PROJECT,
        "run": 1,
        "event": 3,
        "error": {"code": "bad-row", "message": "A row is bad."},
    }


def test_many_claim_and_one_gets_it(database: Database) -> None:
    add(database)
    cancel(database, seed_job(database))
    found: list[Attempt | None] = []
    racers = [threading.Thread(target=lambda: found.append(claim(database))) for _ in range(6)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    (attempt,) = [each for each in found if each is not None]
    assert attempt.number == 1
    assert record(database, attempt, OK) is None
    assert claim(database) is None


def test_what_is_busy_waits_and_others_do_not(database: Database) -> None:
    first, second = add(database), add(database)
    cancel(database, seed_job(database))
    attempt = claim(database, busy_webhooks=[first])
    assert attempt is not None
    assert attempt.webhook_id == second
    assert claim(database, busy_projects=[DEFAULT_PROJECT]) is None
    assert claimed(database).webhook_id == first


def test_a_failed_attempt_is_tried_again_later_until_there_are_no_more(database: Database) -> None:
    webhook_id = add(database)
    cancel(database, seed_job(database))
    bodies = set()
    for number, seconds in enumerate(RETRY_SECONDS, 1):
        attempt = claimed(database)
        bodies.add((attempt.delivery_id, attempt.body))
        assert attempt.number == number
        record(database, attempt, DOWN)
        (delivery,) = deliveries(database, webhook_id)
        assert delivery.state == DeliveryState.PENDING
        assert delivery.next_attempt_at is not None
        with database.reading() as session:
            wait = (delivery.next_attempt_at - now(session)).total_seconds()
        assert 0.75 * seconds - 5 < wait <= 1.25 * seconds
        assert claim(database) is None
        make_due(database)
    record(database, claimed(database), Outcome(500, None, 1))
    (delivery,) = deliveries(database, webhook_id)
    assert (delivery.state, delivery.next_attempt_at) == (DeliveryState.FAILED, None)
    assert [each["error"] for each in delivery.attempts] == ["no connection"] * 8 + [None]
    assert delivery.attempts[-1]["status"] == 500
    assert len(bodies) == 1  # the same message each time
    with database.reading() as session:
        assert webhooks.seconds_until_due(session) is None


def test_the_wait_is_the_same_for_all_who_ask_and_not_for_all_who_failed() -> None:
    assert webhooks.retry_seconds("dlv_a", 3) == webhooks.retry_seconds("dlv_a", 3)
    waits = {webhooks.retry_seconds(f"dlv_{each}", 3) for each in range(50)}
    assert len(waits) == 50
    assert 90 <= min(waits) < 105 < 135 < max(waits) <= 150


def test_a_claim_of_a_worker_that_died_ends(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(database)
    cancel(database, seed_job(database))
    monkeypatch.setattr(webhooks, "CLAIM_SECONDS", -1.0)
    lost = claimed(database)
    again = claimed(database)
    assert (again.delivery_id, again.number) == (lost.delivery_id, 2)
    record(database, lost, DOWN)  # it was not dead after all: logged, and no more than that
    with database.reading() as session:
        delivery = session.get_one(WebhookDelivery, again.delivery_id)
        assert (delivery.state, len(delivery.attempts)) == (DeliveryState.PENDING, 1)
    record(database, again, OK)
    record(database, lost, DOWN)
    with database.reading() as session:
        assert session.get_one(WebhookDelivery, again.delivery_id).state == DeliveryState.DELIVERED


@pytest.mark.parametrize("outcome", [Outcome(410, None, 1), DOWN])
def test_an_endpoint_that_is_gone_or_fails_for_long_is_disabled(
    database: Database, outcome: Outcome
) -> None:
    webhook_id = add(database)
    for _ in range(3):
        cancel(database, seed_job(database))
    first = claimed(database)
    if outcome.status is None:
        assert record(database, first, outcome) is None
        reason = record(database, claimed(database), outcome, disable_seconds=0)
        assert reason is not None
        assert reason.startswith("Nothing arrived since 20")
        assert reason.endswith("UTC; at last no connection.")
    else:
        reason = record(database, first, outcome)
        assert reason == "Its endpoint answered 410 Gone."
    with database.reading() as session:
        webhook = webhooks.get_webhook(session, webhook_id, project_id=DEFAULT_PROJECT)
        assert webhook.disabled_at is not None
        assert webhook.disabled_reason == reason
    assert {each.state for each in deliveries(database, webhook_id)} == {DeliveryState.FAILED}
    cancel(database, seed_job(database))
    assert len(deliveries(database, webhook_id)) == 3  # nothing new is kept for it
    with database.transaction() as session, pytest.raises(Conflict, match="enable it first"):
        webhooks.redeliver(session, webhook_id, first.delivery_id, project_id=DEFAULT_PROJECT)
    for enabled in (True, False):
        with database.transaction() as session:
            webhook, changed = webhooks.enable_webhook(
                session, webhook_id, project_id=DEFAULT_PROJECT
            )
            assert changed is enabled
            assert (webhook.disabled_at, webhook.failing_since) == (None, None)
    cancel(database, seed_job(database))
    assert claim(database) is not None


def test_a_success_ends_a_time_of_failures(database: Database) -> None:
    webhook_id = add(database)
    for _ in range(3):
        cancel(database, seed_job(database))
    record(database, claimed(database), DOWN)
    record(database, claimed(database), OK)
    assert record(database, claimed(database), DOWN, disable_seconds=0.0) is not None
    # For the time is counted from this failure on, and not from the first one:
    with database.transaction() as session:
        webhooks.enable_webhook(session, webhook_id, project_id=DEFAULT_PROJECT)
    cancel(database, seed_job(database))
    assert record(database, claimed(database), DOWN, disable_seconds=60.0) is None


def test_a_delivery_is_made_again_with_all_its_retries(database: Database) -> None:
    webhook_id = add(database)
    cancel(database, seed_job(database))
    attempt = claimed(database)

    def again() -> WebhookDelivery:
        with database.transaction() as session:
            return webhooks.redeliver(
                session, webhook_id, attempt.delivery_id, project_id=DEFAULT_PROJECT
            )

    assert again().claimed_until is not None  # it is being sent: nothing changes
    assert claim(database) is None
    record(database, attempt, OK)
    assert again().state == DeliveryState.PENDING
    second = claimed(database)
    assert (second.delivery_id, second.number, second.body) == (
        attempt.delivery_id,
        1,
        attempt.body,
    )
    record(database, second, DOWN)
    again()  # and does not wait for the retry
    record(database, claimed(database), OK)
    (delivery,) = deliveries(database, webhook_id)
    assert [each["status"] for each in delivery.attempts] == [204, None, 204]
    with database.transaction() as session, pytest.raises(NotFound):
        webhooks.redeliver(session, webhook_id, "dlv_absent", project_id=DEFAULT_PROJECT)


def test_the_log_of_a_delivery_is_bounded(database: Database) -> None:
    webhook_id = add(database)
    cancel(database, seed_job(database))
    for number in range(webhooks.MAX_ATTEMPTS_KEPT + 2):
        attempt = claimed(database)
        record(database, attempt, Outcome(200, None, number))
        with database.transaction() as session:
            webhooks.redeliver(session, webhook_id, attempt.delivery_id, project_id=DEFAULT_PROJECT)
    (delivery,) = deliveries(database, webhook_id)
    assert [each["milliseconds"] for each in delivery.attempts] == list(range(2, 32))


def test_a_webhook_goes_with_its_log_while_events_come(database: Database) -> None:
    """An event that was being written for it must not fail for that: it is a run's last write."""
    for _ in range(5):
        webhook_id = add(database)
        jobs = [seed_job(database) for _ in range(4)]
        failed: list[BaseException] = []

        def trying(work: Callable[[], None], failed: list[BaseException] = failed) -> None:
            try:
                work()
            except BaseException as error:
                failed.append(error)

        def delete(webhook_id: str = webhook_id) -> None:
            with database.transaction() as session:
                webhooks.delete_webhook(session, webhook_id, project_id=DEFAULT_PROJECT)

        works = [*(lambda job_id=job_id: cancel(database, job_id) for job_id in jobs), delete]
        threads = [threading.Thread(target=trying, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
    with database.reading() as session:
        assert session.scalars(select(WebhookDelivery.id)).all() == []


def test_a_deleted_webhooks_attempt_is_recorded_nowhere(database: Database) -> None:
    webhook_id = add(database)
    cancel(database, seed_job(database))
    attempt = claimed(database)
    with database.transaction() as session:
        webhooks.delete_webhook(session, webhook_id, project_id=DEFAULT_PROJECT)
    assert record(database, attempt, OK) is None


def test_a_project_has_a_bounded_number(database: Database) -> None:
    for _ in range(webhooks.MAX_WEBHOOKS - 1):
        add(database)
    start, outcomes = threading.Barrier(6), []

    def race() -> None:
        start.wait()
        try:
            outcomes.append(add(database))
        except Conflict as error:
            outcomes.append(error.message)

    racers = [threading.Thread(target=race) for _ in range(6)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len([each for each in outcomes if each.startswith("whk_")]) == 1
    assert len([each for each in outcomes if "delete one first" in each]) == 5


def test_old_deliveries_go_and_waiting_ones_stay(database: Database) -> None:
    webhook_id = add(database)
    for _ in range(3):
        cancel(database, seed_job(database))
    done = claimed(database)
    record(database, done, OK)
    recent = claimed(database)
    record(database, recent, OK)
    with database.transaction() as session:
        session.get_one(WebhookDelivery, done.delivery_id).ended_at = now(session) - timedelta(
            days=2
        )
    with database.transaction() as session:
        assert webhooks.delete_old_deliveries(session, older_than_seconds=DAY) == 1
    left = deliveries(database, webhook_id)
    assert done.delivery_id not in {each.id for each in left}
    assert {each.state for each in left} == {DeliveryState.PENDING, DeliveryState.DELIVERED}
