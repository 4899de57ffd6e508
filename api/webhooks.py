"""Webhooks: made, listed and deleted by the admins of their project, with the log of what was sent.
The workers send: see jobs.webhooks."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Body, Path, Response

from api.deps import After, Limit, PrincipalDep, Services, ServicesDep
from api.schemas import DeliveryOut, Id, Page, WebhookCreated, WebhookIn, WebhookOut
from jobs import access, records, webhooks
from jobs.access import Actor
from jobs.webhook_signing import new_secret
from jobs.webhook_targets import (
    Target,
    TargetRefused,
    TargetUnknown,
    addresses_of,
    parse_target,
)

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])
WebhookId = Annotated[Id, Path(examples=["whk_3q2-7wAAQkSgMvUuTqBvxQ"])]
DeliveryId = Annotated[Id, Path(examples=["dlv_u9kXb1mJT0yq0v2n5Qw8Zg"])]

EXAMPLES: dict[str, Any] = {
    "ends": {
        "summary": "When a job has ended",
        "value": {"url": "https://hooks.example.com/widthwise"},
    },
    "failures": {
        "summary": "When a job has failed, or its worker went silent",
        "value": {
            "url": "https://hooks.example.com/on-call?team=search",
            "events": ["job.failed", "job.requeued"],
        },
    },
}


@router.post(
    "",
    status_code=201,
    summary="Create a webhook",
    description="From now on the project's events of these types are POSTed there as JSON, signed "
    "as Standard Webhooks says (`webhook-id`, `webhook-timestamp`, `webhook-signature`). A 2xx "
    "within 15 seconds is taken for received; redirects are not followed. Else it is tried again "
    "for about 19 hours, later and later. An endpoint that answers 410, or to which nothing "
    "arrived for five days, is disabled. A message may come twice, with the same `webhook-id`, and "
    "messages may come in another order than what they tell. `secret` is shown in this answer and "
    "never again.",
)
async def create_webhook(
    services: ServicesDep,
    principal: PrincipalDep,
    body: Annotated[WebhookIn, Body(openapi_examples=EXAMPLES)],
    response: Response,
) -> WebhookCreated:
    # A host's own name server says how long its answer takes.
    target = await to_thread.run_sync(_checked, services, body.url, limiter=services.lookups)
    webhook = await to_thread.run_sync(_create, services, principal.actor, body, target)
    response.headers["Location"] = f"/v1/webhooks/{webhook.id}"
    response.headers["Cache-Control"] = "no-store"
    return WebhookCreated.of(webhook)


def _checked(services: Services, url: str) -> Target:
    """For whoever mistypes: what counts is checked again each time it is called."""
    try:
        target = parse_target(url)
        addresses_of(
            target,
            resolver=services.resolver,
            allowed=services.settings.webhook_allowed_networks,
        )
    except (TargetRefused, TargetUnknown) as error:
        error.pointer = "/url"
        raise
    return target


def _create(services: Services, actor: Actor, body: WebhookIn, target: Target) -> records.Webhook:
    with services.database.transaction() as session:
        webhook = webhooks.add_webhook(
            session,
            project_id=actor.project_id,
            url=body.url,
            events=body.events,
            secret=new_secret(),
        )
        access.record_action(
            session,
            actor,
            "webhook.created",
            webhook.id,
            host=target.authority,  # the rest may be a secret
            events=webhook.events,
        )
    return webhook


@router.get("", summary="Webhooks, newest first")
def list_webhooks(
    services: ServicesDep, principal: PrincipalDep, after: After = None, limit: Limit = 50
) -> Page[WebhookOut]:
    with services.database.reading() as session:
        found = webhooks.list_webhooks(
            session, project_id=principal.project_id, after=after, limit=limit + 1
        )
    return Page[WebhookOut].of(found, limit, WebhookOut.of)


@router.get("/{webhook_id}", summary="A webhook")
def get_webhook(
    webhook_id: WebhookId, services: ServicesDep, principal: PrincipalDep
) -> WebhookOut:
    with services.database.reading() as session:
        return WebhookOut.of(
            webhooks.get_webhook(session, webhook_id, project_id=principal.project_id)
        )


@router.delete(
    "/{webhook_id}",
    status_code=204,
    summary="Delete a webhook",
    description="With its secret and its log. What is being sent at this moment still arrives.",
)
def delete_webhook(webhook_id: WebhookId, services: ServicesDep, principal: PrincipalDep) -> None:
    with services.database.transaction() as session:
        webhooks.delete_webhook(session, webhook_id, project_id=principal.project_id)
        access.record_action(session, principal.actor, "webhook.deleted", webhook_id)


@router.post(
    "/{webhook_id}/enable",
    summary="Enable a webhook again",
    description="After it was disabled. What it missed can be delivered again, one by one. Asking "
    "again changes nothing.",
)
def enable_webhook(
    webhook_id: WebhookId, services: ServicesDep, principal: PrincipalDep
) -> WebhookOut:
    with services.database.transaction() as session:
        webhook, changed = webhooks.enable_webhook(
            session, webhook_id, project_id=principal.project_id
        )
        if changed:
            access.record_action(session, principal.actor, "webhook.enabled", webhook_id)
        return WebhookOut.of(webhook)


@router.get(
    "/{webhook_id}/deliveries",
    summary="What was sent, newest first",
    description="Each event with every attempt and what was answered, for 30 days unless the "
    "service's operator chose otherwise.",
)
def list_deliveries(
    webhook_id: WebhookId,
    services: ServicesDep,
    principal: PrincipalDep,
    after: After = None,
    limit: Limit = 50,
) -> Page[DeliveryOut]:
    with services.database.reading() as session:
        found = webhooks.list_deliveries(
            session, webhook_id, project_id=principal.project_id, after=after, limit=limit + 1
        )
    return Page[DeliveryOut].of(found, limit, DeliveryOut.of)


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/redeliver",
    status_code=202,
    summary="Deliver it again",
    description="At once, whatever came of it before, under the same `webhook-id`; with all "
    "retries. 409 where the webhook is disabled.",
)
def redeliver(
    webhook_id: WebhookId,
    delivery_id: DeliveryId,
    services: ServicesDep,
    principal: PrincipalDep,
) -> DeliveryOut:
    with services.database.transaction() as session:
        delivery = webhooks.redeliver(
            session, webhook_id, delivery_id, project_id=principal.project_id
        )
        access.record_action(
            session, principal.actor, "webhook.redelivered", webhook_id, delivery=delivery_id
        )
        return DeliveryOut.of(delivery)
