"""Webhooks through the API: what is made, refused, logged and delivered again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from api.webhooks import EXAMPLES
from jobs import webhooks
from jobs.queue import DELIVER_WEBHOOK
from jobs.webhooks import MAX_WEBHOOKS, Outcome
from tests.api.conftest import Service, assert_problem, serving, wait_for

HOOK = "https://203.0.114.7/hook?token=t"


@pytest.fixture
def webhook(service: Service) -> Iterator[dict[str, Any]]:
    answer = service.client.post("/v1/webhooks", json={"url": HOOK})
    assert answer.status_code == 201, answer.text
    yield answer.json()
    service.client.delete(f"/v1/webhooks/{answer.json()['id']}")


def cancelled_job(service: Service) -> str:
    job_id = service.new_job()
    assert service.client.post(f"/v1/jobs/{job_id}/cancel").status_code == 202
    return job_id


def test_a_webhook_is_made_shown_and_deleted(service: Service) -> None:
    body = {"url": HOOK, "events": ["job.failed", "job.started", "job.failed"]}
    created = service.client.post("/v1/webhooks", json=body)
    assert created.status_code == 201
    assert created.headers["cache-control"] == "no-store"
    shown = created.json()
    secret = shown.pop("secret")
    assert secret.startswith("whsec_")
    path = f"/v1/webhooks/{shown['id']}"
    assert created.headers["location"] == path
    assert (shown["url"], shown["events"]) == (HOOK, ["job.failed", "job.started"])
    assert service.client.get(path).json() == shown
    assert shown in service.client.get("/v1/webhooks").json()["items"]
    for where in (path, "/v1/webhooks", "/v1/audit"):
        assert secret not in service.client.get(where).text
    deleted = service.client.delete(path)
    assert (deleted.status_code, deleted.content) == (204, b"")
    for again in (service.client.delete(path), service.client.get(path)):
        assert_problem(again, 404, "not-found")


def test_a_slow_name_server_holds_up_new_webhooks_alone(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner may be the one who asks; more of them at once than the service has threads."""
    resolve, answers = socket.getaddrinfo, threading.Event()

    def slow(host: str, *more: Any, **named: Any) -> Any:
        if host != "slow.example":
            return resolve(host, *more, **named)
        answers.wait(60)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    url = {"url": "https://slow.example/"}
    with ThreadPoolExecutor(50) as many:
        asked = [many.submit(service.client.post, "/v1/webhooks", json=url) for _ in range(50)]
        try:
            waiting = service.services.lookups
            wait_for(lambda: waiting.borrowed_tokens == waiting.total_tokens)
            assert service.client.get("/v1/me", timeout=10).status_code == 200
        finally:
            answers.set()
        for each in asked:
            assert_problem(each.result(), 422, "webhook-host-unknown")


def test_by_default_the_ends_of_jobs_are_told(webhook: dict[str, Any]) -> None:
    assert webhook["events"] == ["job.cancelled", "job.failed", "job.succeeded"]


def test_a_jobs_end_is_in_the_log_and_on_the_queue(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as service:
        webhook = service.client.post("/v1/webhooks", json={"url": HOOK}).json()
        job_id = cancelled_job(service)
        log = service.client.get(f"/v1/webhooks/{webhook['id']}/deliveries").json()
        (delivery,) = log["items"]
        assert delivery["id"].startswith("dlv_")
        assert (delivery["event"], delivery["job"]) == ("job.cancelled", job_id)
        assert (delivery["state"], delivery["attempts"]) == ("pending", [])
        assert delivery["next_attempt_at"] is not None

        def queued() -> list[str]:
            waiting = service.settings.data_dir / "broker" / "waiting"
            return [
                text for path in waiting.iterdir() if DELIVER_WEBHOOK in (text := path.read_text())
            ]

        wait_for(queued)
        assert len(queued()) == 1
        assert HOOK not in queued()[0]  # an id, and nothing of what it stands for


def test_the_log_is_paged_and_tells_each_attempt(service: Service, webhook: dict[str, Any]) -> None:
    jobs = [cancelled_job(service) for _ in range(3)]
    database = service.services.database
    with database.transaction() as session:
        attempt = webhooks.claim_delivery(session)
        assert attempt is not None
    with database.transaction() as session:
        webhooks.record_attempt(session, attempt, Outcome(500, None, 7), disable_seconds=1e6)
    path = f"/v1/webhooks/{webhook['id']}/deliveries"
    first = service.client.get(f"{path}?limit=2").json()
    rest = service.client.get(f"{path}?limit=2&after={first['next']}").json()
    told = [*first["items"], *rest["items"]]
    assert [each["job"] for each in told] == jobs[::-1]
    assert rest["next"] is None
    (tried,) = [each for each in told if each["attempts"]]
    assert tried["id"] == attempt.delivery_id
    assert (tried["attempts"][0]["status"], tried["state"]) == (500, "pending")
    assert service.client.get(f"/v1/webhooks/{webhook['id']}").json()["failing_since"] is not None
    assert_problem(service.client.get(f"{path}?after=dlv_absent"), 404, "not-found")


def test_a_delivery_is_made_again(service: Service, webhook: dict[str, Any]) -> None:
    cancelled_job(service)
    database = service.services.database
    with database.transaction() as session:
        attempt = webhooks.claim_delivery(session)
        assert attempt is not None
        webhooks.record_attempt(session, attempt, Outcome(200, None, 7), disable_seconds=1e6)
    path = f"/v1/webhooks/{webhook['id']}"
    again = f"{path}/deliveries/{attempt.delivery_id}/redeliver"
    assert service.client.get(f"{path}/deliveries").json()["items"][0]["state"] == "delivered"
    answer = service.client.post(again)
    assert (answer.status_code, answer.json()["state"]) == (202, "pending")
    assert_problem(service.client.post(f"{path}/deliveries/dlv_absent/redeliver"), 404, "not-found")
    with database.transaction() as session:
        second = webhooks.claim_delivery(session)
        assert second is not None
        webhooks.record_attempt(session, second, Outcome(410, None, 7), disable_seconds=1e6)
    shown = service.client.get(path).json()
    assert shown["disabled_reason"] == "Its endpoint answered 410 Gone."
    assert_problem(service.client.post(again), 409, "webhook-disabled")
    assert service.client.post(f"{path}/enable").json()["disabled_at"] is None
    assert service.client.post(again).status_code == 202
    actions = service.client.get(f"/v1/audit?target={webhook['id']}").json()["items"]
    assert [each["action"] for each in actions] == [
        "webhook.redelivered",
        "webhook.enabled",
        "webhook.redelivered",
        "webhook.created",
    ]


@pytest.mark.parametrize(
    ("body", "status", "code", "pointer"),
    [
        ({}, 422, "invalid-request", "/url"),
        ({"url": 1}, 422, "invalid-request", "/url"),
        ({"url": "x" * 3000}, 422, "invalid-request", "/url"),
        ({"url": HOOK, "events": []}, 422, "invalid-request", "/events"),
        ({"url": HOOK, "events": ["job.progress"]}, 422, "invalid-request", "/events/0"),
        ({"url": HOOK, "events": ["job.failed"] * 7}, 422, "invalid-request", "/events"),
        ({"url": HOOK, "secret": "whsec_mine"}, 422, "invalid-request", "/secret"),
        ({"url": "hooks.example"}, 422, "webhook-url-refused", "/url"),
        ({"url": "https://user:pw@hooks.example/"}, 422, "webhook-url-refused", "/url"),
        ({"url": "https://localhost:8000/"}, 422, "webhook-url-refused", "/url"),
        ({"url": "https://2130706433/"}, 422, "webhook-url-refused", "/url"),
        ({"url": "https://[::ffff:169.254.169.254]/"}, 422, "webhook-url-refused", "/url"),
        ({"url": "http://203.0.114.7/"}, 422, "webhook-url-refused", "/url"),
        ({"url": "https://203.0.114.7:22/"}, 422, "webhook-url-refused", "/url"),
    ],
)
def test_a_webhook_that_would_be_wrong_is_not_made(
    service: Service, body: dict[str, Any], status: int, code: str, pointer: str
) -> None:
    before = service.client.get("/v1/webhooks").json()
    problem = assert_problem(service.client.post("/v1/webhooks", json=body), status, code)
    assert problem["pointer"] == pointer
    assert service.client.get("/v1/webhooks").json() == before


def test_a_host_without_an_address_is_told(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *more: Any, **options: Any) -> Any:
        if host == "hooks.example":
            raise socket.gaierror(-2, "Name or service not known")
        return real(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    answer = service.client.post("/v1/webhooks", json={"url": "https://hooks.example/"})
    assert assert_problem(answer, 422, "webhook-host-unknown")["pointer"] == "/url"


def test_a_network_of_ones_own_is_allowed_by_setting(tmp_path: Path) -> None:
    with serving(tmp_path / "data", webhook_allowed_networks=("10.1.0.0/16",)) as service:
        for url, status in (
            ("http://10.1.2.3:8080/x", 201),
            ("http://10.2.2.3:8080/x", 422),
            ("http://127.0.0.1:8080/x", 422),
        ):
            assert service.client.post("/v1/webhooks", json={"url": url}).status_code == status


def test_a_project_has_a_bounded_number(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as service:
        for _ in range(MAX_WEBHOOKS):
            assert service.client.post("/v1/webhooks", json={"url": HOOK}).status_code == 201
        answer = service.client.post("/v1/webhooks", json={"url": HOOK})
        assert_problem(answer, 409, "too-many-webhooks")


def test_the_examples_fit_the_schema(service: Service) -> None:
    document = service.client.get("/openapi.json").json()
    schema = document["components"]["schemas"]["WebhookIn"] | {"components": document["components"]}
    assert len(EXAMPLES) >= 2
    for example in EXAMPLES.values():
        jsonschema.validate(example["value"], schema)
