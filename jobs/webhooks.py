"""Webhooks of a project, and the deliveries of events to them; each call inside a transaction that
the caller opened.

A delivery is a row, written with the event that it tells (store), so that neither is there without
the other. Workers claim due ones by compare-and-set and record each attempt; one that dies in
between leaves a claim that ends, and the message is sent again with the same id, by which a
receiver knows it. Retries come later and later, and an endpoint that fails for long is disabled.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from jobs.blobs import hold_project
from jobs.db import now
from jobs.errors import Conflict, NotFound
from jobs.nudges import note_delivery
from jobs.paging import get_of_project, page_of_project
from jobs.records import Event, Job, Webhook, WebhookDelivery, new_id
from jobs.states import DeliveryState

MAX_WEBHOOKS = 20  # of a project
MAX_ATTEMPTS_KEPT = 30  # in a delivery's log, the newest
RETRY_SECONDS = (5, 30, 120, 600, 1800, 7200, 18000, 36000)  # about 19 hours, each +-25 %
CLAIM_SECONDS = 120.0  # longer than any attempt may take
_GONE = 410


class WebhookEvent(StrEnum):
    """What may be told: the kinds of a job's events, but for its progress."""

    JOB_QUEUED = "job.queued"
    JOB_STARTED = "job.started"
    JOB_REQUEUED = "job.requeued"
    JOB_SUCCEEDED = "job.succeeded"
    JOB_FAILED = "job.failed"
    JOB_CANCELLED = "job.cancelled"


_TOLD = frozenset(WebhookEvent)
JOB_ENDS = (WebhookEvent.JOB_SUCCEEDED, WebhookEvent.JOB_FAILED, WebhookEvent.JOB_CANCELLED)


# --- webhooks, as their project sees them -----------------------------------------------


def add_webhook(
    session: Session, *, project_id: str, url: str, events: Sequence[WebhookEvent], secret: str
) -> Webhook:
    """Conflict ("too-many-webhooks") where the project has as many as it may."""
    hold_project(session, project_id)  # or two at once would not see each other
    count = select(func.count()).where(Webhook.project_id == project_id)
    if (session.scalar(count) or 0) >= MAX_WEBHOOKS:
        raise Conflict(
            f"The project has {MAX_WEBHOOKS} webhooks, as many as it may: delete one first.",
            code="too-many-webhooks",
        )
    webhook = Webhook(
        id=new_id("webhook"),
        project_id=project_id,
        url=url,
        events=sorted(set(events)),
        secret=secret,
        created_at=now(session),
        failing_since=None,
        disabled_at=None,
        disabled_reason=None,
    )
    session.add(webhook)
    session.flush()
    return webhook


def get_webhook(session: Session, id: str, *, project_id: str) -> Webhook:
    return get_of_project(session, Webhook, "webhook", id, project_id)


def list_webhooks(
    session: Session, *, project_id: str, after: str | None = None, limit: int = 50
) -> list[Webhook]:
    """Newest first; `after` as everywhere."""
    return page_of_project(session, Webhook, "webhook", project_id, after, limit)


def delete_webhook(session: Session, id: str, *, project_id: str) -> None:
    """With its secret and its log. What is being sent meanwhile arrives."""
    webhook = _locked(session, id, project_id)
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.webhook_id == id))
    session.delete(webhook)
    session.flush()


def enable_webhook(session: Session, id: str, *, project_id: str) -> tuple[Webhook, bool]:
    """Calls it again from now on; also whether it was disabled. What it missed stays undelivered
    until it is delivered again one by one."""
    webhook = _locked(session, id, project_id)
    was_disabled = webhook.disabled_at is not None
    webhook.disabled_at = webhook.disabled_reason = webhook.failing_since = None
    session.flush()
    return webhook, was_disabled


def list_deliveries(
    session: Session, webhook_id: str, *, project_id: str, after: str | None = None, limit: int = 50
) -> list[WebhookDelivery]:
    """The log, newest first; `after` as everywhere."""
    get_webhook(session, webhook_id, project_id=project_id)
    mine = WebhookDelivery.webhook_id == webhook_id
    return page_of_project(session, WebhookDelivery, "delivery", project_id, after, limit, mine)


def redeliver(
    session: Session, webhook_id: str, delivery_id: str, *, project_id: str
) -> WebhookDelivery:
    """Makes a delivery due now, with all its retries; one that is being sent stays as it is.
    Conflict ("webhook-disabled") where its webhook is."""
    webhook = _locked(session, webhook_id, project_id)
    delivery = session.scalar(
        select(WebhookDelivery)
        .where(WebhookDelivery.id == delivery_id, WebhookDelivery.webhook_id == webhook_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if delivery is None:
        raise NotFound("delivery", delivery_id)
    if webhook.disabled_at is not None:
        raise Conflict("The webhook is disabled: enable it first.", code="webhook-disabled")
    at = now(session)
    if not (delivery.claimed_until is not None and delivery.claimed_until >= at):
        delivery.state = DeliveryState.PENDING
        delivery.tries = 0
        delivery.next_attempt_at = at
        delivery.claimed_until = delivery.ended_at = None
        session.flush()
        note_delivery(session, delivery.id)
    return delivery


def _locked(session: Session, id: str, project_id: str) -> Webhook:
    """Events that are being written for it are waited for, and later ones wait."""
    webhook = session.scalar(
        select(Webhook)
        .where(Webhook.id == id, Webhook.project_id == project_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if webhook is None:
        raise NotFound("webhook", id)
    return webhook


# --- deliveries, as an event makes them -------------------------------------------------


def add_deliveries(session: Session, event: Event) -> None:
    """One for each webhook of the event's project that wants its kind, due at once."""
    wanted = f"job.{event.kind}"
    if wanted not in _TOLD:
        return
    webhooks = session.scalars(
        select(Webhook)
        .where(Webhook.project_id == event.project_id, Webhook.disabled_at.is_(None))
        .with_for_update(read=True, key_share=True)  # none of them goes before this commits
    )
    for webhook in webhooks:
        if wanted not in webhook.events:
            continue
        delivery = WebhookDelivery(
            id=new_id("webhook_delivery"),
            project_id=event.project_id,
            webhook_id=webhook.id,
            event=wanted,
            job_id=event.job_id,
            event_number=event.number,
            state=DeliveryState.PENDING,
            tries=0,
            next_attempt_at=event.created_at,
            claimed_until=None,
            attempts=[],
            created_at=event.created_at,
            ended_at=None,
        )
        session.add(delivery)
        note_delivery(session, delivery.id)
    session.flush()


# --- deliveries, as workers see them ----------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """The right to send a message once, for CLAIM_SECONDS. `number` counts since the delivery was
    last asked for, from 1."""

    delivery_id: str
    webhook_id: str
    project_id: str
    number: int
    url: str
    secret: str
    body: bytes


@dataclass(frozen=True)
class Outcome:
    """Of an attempt: the status that was answered, or why there was no answer."""

    status: int | None
    error: str | None
    milliseconds: int

    @property
    def is_success(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


def claim_delivery(
    session: Session,
    *,
    busy_webhooks: Collection[str] = (),
    busy_projects: Collection[str] = (),
) -> Attempt | None:
    """The delivery that is due for longest and not for a busy webhook or project; None if there is
    none, or others were faster with all that were looked at."""
    at = now(session)
    is_due = (
        WebhookDelivery.state == DeliveryState.PENDING,
        WebhookDelivery.next_attempt_at <= at,
        or_(WebhookDelivery.claimed_until.is_(None), WebhookDelivery.claimed_until < at),
    )
    due = session.scalars(
        select(WebhookDelivery.id)
        .where(
            *is_due,
            WebhookDelivery.webhook_id.not_in(busy_webhooks),
            WebhookDelivery.project_id.not_in(busy_projects),
        )
        .order_by(WebhookDelivery.next_attempt_at, WebhookDelivery.id)
        .limit(10)
    ).all()
    for id in due:
        claimed = session.scalar(
            update(WebhookDelivery)
            .where(WebhookDelivery.id == id, *is_due)
            .values(
                claimed_until=at + timedelta(seconds=CLAIM_SECONDS),
                tries=WebhookDelivery.tries + 1,
            )
            .returning(WebhookDelivery.id)
            .execution_options(synchronize_session=False)
        )
        if claimed is None:
            continue
        delivery = session.get_one(WebhookDelivery, id, populate_existing=True)
        webhook = session.get_one(Webhook, delivery.webhook_id)
        body = _message(session, delivery)
        if body is not None:
            return Attempt(
                delivery_id=id,
                webhook_id=webhook.id,
                project_id=delivery.project_id,
                number=delivery.tries,
                url=webhook.url,
                secret=webhook.secret,
                body=body,
            )
        _end(delivery, DeliveryState.FAILED, at)  # its job was deleted: nothing to tell
    return None


def seconds_until_due(session: Session) -> float | None:
    """Until the next delivery that nobody has claimed; 0 where one is due, None without any."""
    at = now(session)
    soonest = session.scalar(
        select(func.min(WebhookDelivery.next_attempt_at)).where(
            WebhookDelivery.state == DeliveryState.PENDING,
            or_(WebhookDelivery.claimed_until.is_(None), WebhookDelivery.claimed_until < at),
        )
    )
    return None if soonest is None else max(0.0, (soonest - at).total_seconds())


def seconds_overdue(session: Session) -> float:
    """For how long the delivery that has waited longest has been due."""
    soonest = session.scalar(
        select(func.min(WebhookDelivery.next_attempt_at)).where(
            WebhookDelivery.state == DeliveryState.PENDING
        )
    )
    return 0.0 if soonest is None else max(0.0, (now(session) - soonest).total_seconds())


def _message(session: Session, delivery: WebhookDelivery) -> bytes | None:
    """The body, the same at each attempt; None where the event is gone. It says what happened, and
    leaves what may be long or private (rows of a dataset) to be asked for."""
    event = session.get(Event, (delivery.job_id, delivery.event_number))
    job = session.get(Job, delivery.job_id)
    if event is None or job is None:
        return None
    data = {
        "job": job.id,
        "name": job.name,
        "project": job.project_id,
        "run": event.fence,
        "event": event.number,
    }
    error = event.data.get("error")
    if isinstance(error, dict):
        data["error"] = {"code": error.get("code"), "message": error.get("message")}
    message = {
        "type": delivery.event,
        "timestamp": event.created_at.isoformat(),
        "data": data,
    }
    return json.dumps(message, separators=(",", ":")).encode()


def record_attempt(
    session: Session, attempt: Attempt, outcome: Outcome, *, disable_seconds: float
) -> str | None:
    """Writes an attempt into the log and settles what comes of it: delivered, a retry, or failed.
    Why its webhook was disabled, if this attempt made it so: a 410, or failures without a success
    between them for `disable_seconds`."""
    webhook = session.scalar(
        select(Webhook)
        .where(Webhook.id == attempt.webhook_id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    )
    delivery = session.scalar(
        select(WebhookDelivery)
        .where(WebhookDelivery.id == attempt.delivery_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if webhook is None or delivery is None:
        return None  # deleted meanwhile
    at = now(session)
    entry = {
        "at": at.isoformat(),
        "status": outcome.status,
        "error": outcome.error,
        "milliseconds": outcome.milliseconds,
    }
    delivery.attempts = [*delivery.attempts, entry][-MAX_ATTEMPTS_KEPT:]
    if delivery.state != DeliveryState.PENDING or delivery.tries != attempt.number:
        return None  # another worker's word counts: our claim had ended
    delivery.claimed_until = None
    if outcome.is_success:
        webhook.failing_since = None
        _end(delivery, DeliveryState.DELIVERED, at)
        return None
    webhook.failing_since = webhook.failing_since or at
    if attempt.number > len(RETRY_SECONDS):
        _end(delivery, DeliveryState.FAILED, at)
    else:
        delay = retry_seconds(delivery.id, attempt.number)
        delivery.next_attempt_at = at + timedelta(seconds=delay)
    said = outcome.error or f"it answered {outcome.status}"
    if outcome.status == _GONE:
        return _disable(session, webhook, "Its endpoint answered 410 Gone.", at)
    if at - webhook.failing_since >= timedelta(seconds=disable_seconds):
        since = f"{webhook.failing_since:%Y-%m-%d %H:%M} UTC"
        return _disable(session, webhook, f"Nothing arrived since {since}; at last {said}.", at)
    return None


def retry_seconds(delivery_id: str, number: int) -> float:
    """How long to wait after the attempt of this number: the same for whoever asks, and not the
    same for all that failed together."""
    spread = random.Random(f"{delivery_id}/{number}").uniform(0.75, 1.25)
    return RETRY_SECONDS[number - 1] * spread


def delete_old_deliveries(session: Session, *, older_than_seconds: float, limit: int = 1000) -> int:
    """Of those that have ended; how many went."""
    before = now(session) - timedelta(seconds=older_than_seconds)
    old = select(WebhookDelivery.id).where(WebhookDelivery.ended_at < before).limit(limit)
    gone = session.execute(
        delete(WebhookDelivery)
        .where(WebhookDelivery.id.in_(old))
        .returning(WebhookDelivery.id)
        .execution_options(synchronize_session=False)
    )
    return len(gone.all())


def _disable(session: Session, webhook: Webhook, reason: str, at: datetime) -> str:
    webhook.disabled_at = at
    webhook.disabled_reason = reason[:500]
    session.flush()
    session.execute(
        update(WebhookDelivery)
        .where(
            WebhookDelivery.webhook_id == webhook.id,
            WebhookDelivery.state == DeliveryState.PENDING,
        )
        .values(**_ended(DeliveryState.FAILED, at))
        .execution_options(synchronize_session=False)
    )
    return reason


def _end(delivery: WebhookDelivery, state: DeliveryState, at: datetime) -> None:
    for name, value in _ended(state, at).items():
        setattr(delivery, name, value)


def _ended(state: DeliveryState, at: datetime) -> dict[str, Any]:
    return {"state": state, "ended_at": at, "next_attempt_at": None, "claimed_until": None}
