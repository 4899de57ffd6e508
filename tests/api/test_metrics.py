"""What Prometheus is told, in few words, and that the example alerts ask for what there is."""

from __future__ import annotations

import re
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from jobs.devices import Device
from jobs.metrics import OTHER, FewWords, MetricsServer
from jobs.records import Job
from jobs.roles import Role
from jobs.states import JobState
from jobs.webhooks import Outcome
from tests.api.conftest import Service, serving, wait_for
from tests.services import free_port
from worker.metrics import WorkerMetrics

REPOSITORY = Path(__file__).resolve().parents[2]
ALERTS = REPOSITORY / "docker" / "alerts.yml"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(registry: CollectorRegistry) -> Samples:
    """By name and labels, those of ours."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if sample.name.startswith("widthwise_")
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def of_service(service: Service) -> Samples:
    return samples(service.services.metrics.registry)


def test_requests_are_counted_by_route_and_not_by_path(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as service:
        job_id = service.new_job()
        meant = {"X-HTTP-Method-Override": "DELETE"}
        assert service.client.post("/v1/uploads/upl_absent", headers=meant).status_code == 404
        before = of_service(service)
        for path in (f"/v1/jobs/{job_id}", "/v1/jobs/job_absent", "/v1/jobs/job_%7F"):
            service.client.get(path)
        service.client.head(f"/v1/jobs/{job_id}")
        for number in range(3):
            service.client.get(f"/nothing/{number}")
            service.client.request(f"METHOD{number}", "/v1/jobs")
        httpx.get(f"{service.url}/v1/jobs", trust_env=False)
        count, route = "widthwise_http_requests_total", "/v1/jobs/{job_id}"
        refused = (count, (("method", "GET"), ("route", "none"), ("status", "401")))
        wait_for(lambda: refused in of_service(service))  # it is counted after the answer
        found = of_service(service)
        assert value(found, count, method="GET", route=route, status="200") == 1
        assert value(found, count, method="GET", route=route, status="404") == 2
        assert value(found, count, method="HEAD", route=route, status="200") == 1
        upload = "/v1/uploads/{upload_id}"
        assert value(found, count, method="POST", route=upload, status="404") == 1
        assert value(found, count, method="GET", route="none", status="404") == 3
        assert found[refused] == 1
        assert {dict(labels)["method"] for name, labels in found if name == count} <= {
            "GET", "HEAD", "POST", OTHER,
        }  # fmt: skip
        assert job_id not in str(found)
        assert "job_absent" not in str(found)
        timed = value(found, "widthwise_http_answer_seconds_count", method="GET", route=route)
        assert timed == 3
        sent = "widthwise_http_sent_bytes_total"
        assert value(found, sent, route=route) > 1000
        assert value(before, "widthwise_http_received_bytes_total", route="/v1/models") > 1000


def test_the_queue_the_streams_and_refused_uploads_are_told(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as service:
        claim = service.claim(service.new_job())
        waiting = service.new_job()
        with service.services.database.transaction() as session:
            job = session.get_one(Job, waiting)  # made long ago, and queued again just now
            job.created_at -= timedelta(days=30)
        service.client.post("/v1/models?filename=x.tar.gz", content=b"no archive")
        url = f"/v1/jobs/{claim.job_id}/events"
        with service.client.stream("GET", url, headers={"Accept": "text/event-stream"}) as answer:
            incoming = answer.iter_raw()  # kept: without its iterator the connection is closed
            next(incoming)
            found = of_service(service)
        for state in ("queued", "running"):
            assert value(found, "widthwise_jobs", state=state, device="cpu") == 1
            assert value(found, "widthwise_jobs", state=state, device="gpu") == 0
        assert 0 < value(found, "widthwise_queue_oldest_seconds", device="cpu") < 60
        assert value(found, "widthwise_queue_oldest_seconds", device="gpu") == 0
        assert value(found, "widthwise_refused_for_room_total") == 0
        assert value(found, "widthwise_event_streams") == 1
        assert value(found, "widthwise_webhooks_overdue_seconds") == 0
        assert value(found, "widthwise_database_up") == 1
        refused = [key for key in found if key[0] == "widthwise_uploads_refused_total"]
        assert len(refused) == 1
        assert found[refused[0]] == 1
        assert "widthwise_event_streams_redis_up" not in {name for name, _ in found}


def test_without_its_database_the_api_still_tells_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.exc import OperationalError

    with serving(tmp_path / "data") as service:

        def away(*_: Any, **__: Any) -> Any:
            raise OperationalError("SELECT", {}, Exception("away"))

        monkeypatch.setattr("jobs.store.queue_figures", away)
        found = of_service(service)
        assert value(found, "widthwise_database_up") == 0
        assert value(found, "widthwise_event_streams") == 0
        assert "widthwise_jobs" not in {name for name, _ in found}


def test_metrics_have_a_port_of_their_own_and_none_by_default(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path / "data", api_metrics_port=port) as service:
        answer = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
        assert answer.status_code == 200
        assert "widthwise_database_up 1.0" in answer.text
        assert "process_resident_memory_bytes" in answer.text
        # The port that a proxy publishes has no such thing, for whatever key.
        for path in ("/metrics", "/v1/metrics"):
            assert service.client.get(path).status_code == 404
        with serving(tmp_path / "second", api_metrics_port=port) as second:  # it is taken
            assert second.client.get("/healthz").status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
    threads = threading.active_count()
    MetricsServer(CollectorRegistry(), host="127.0.0.1", port=0).close()
    assert threading.active_count() == threads


def test_a_workers_runs_are_told_by_stage_and_outcome() -> None:
    metrics = WorkerMetrics()
    metrics.has_slots(cpu=2, gpu=1)
    metrics.claimed(Device.GPU, waited_seconds=20)
    with metrics.stages() as stages:
        stages.progress({"stage": "load", "step": 0})
        stages.progress({"stage": "distil", "step": 1})
        stages.progress({"stage": "distil", "step": 5})
        found = samples(metrics.registry)
        assert value(found, "widthwise_runs_in_stage", stage="distil") == 1
        assert value(found, "widthwise_runs_in_stage", stage="load") == 0
        stages.progress({"stage": "whatever a child says", "step": 0})
    metrics.run_ended("succeeded")
    metrics.run_ended("lost")
    metrics.lease_expired(JobState.QUEUED)
    metrics.lease_expired(JobState.FAILED)  # it kept killing its workers
    metrics.staged("in", 7)
    metrics.webhook_called(Outcome(204, None, 1), disabled=False)
    metrics.webhook_called(Outcome(410, None, 1), disabled=True)
    metrics.webhook_called(Outcome(None, "x", 1), disabled=False)
    found = samples(metrics.registry)
    assert value(found, "widthwise_runs_in_stage", stage=OTHER) == 0
    assert value(found, "widthwise_step_seconds_count", stage="distil") == 1
    assert value(found, "widthwise_queue_wait_seconds_bucket", device="gpu", le="60.0") == 1
    assert value(found, "widthwise_queue_wait_seconds_bucket", device="gpu", le="15.0") == 0
    assert value(found, "widthwise_queue_wait_seconds_count", device="cpu") == 0
    assert value(found, "widthwise_runs_ended_total", outcome="succeeded") == 1
    for outcome, count in (("succeeded", 1), ("failed", 1), ("cancelled", 0)):
        assert value(found, "widthwise_jobs_ended_total", outcome=outcome) == count
    for who, count in (("run", 1), ("reconciler", 2)):
        assert value(found, "widthwise_lease_losses_total", noticed_by=who) == count
    assert value(found, "widthwise_staged_bytes_total", direction="in") == 7
    for outcome in ("received", "refused", "unanswered"):
        assert value(found, "widthwise_webhook_attempts_total", outcome=outcome) == 1
    assert value(found, "widthwise_webhooks_disabled_total") == 1
    assert value(found, "widthwise_slots", device="cpu") == 2
    assert value(found, "widthwise_slots", device="gpu") == 1


def test_words_that_others_choose_are_bounded() -> None:
    few = FewWords(["known"], most=3)
    assert [few(word) for word in ("a", "known", "b", "c", "a", "known", "d")] == [
        "a", "known", "b", OTHER, "a", "known", OTHER,
    ]  # fmt: skip


# --- the example alerts ---------------------------------------------------------------------


def told_names(service: Service) -> set[str]:
    """Every name there is: families tell even those that have no sample yet."""
    worker = WorkerMetrics()
    worker.staged("in", 1)
    names = set()
    for registry in (service.services.metrics.registry, worker.registry):
        for family in registry.collect():
            suffixes = {
                "counter": ("_total",),
                "histogram": ("_bucket", "_sum", "_count"),
                "gauge": ("",),
            }.get(family.type, ())
            names |= {family.name + suffix for suffix in suffixes}
    return names


def test_every_metric_that_an_alert_asks_for_exists(tmp_path: Path, redis_url: str) -> None:
    document = yaml.safe_load(ALERTS.read_text())
    rules = [rule for group in document["groups"] for rule in group["rules"]]
    assert len(rules) >= 10
    assert len({rule["alert"] for rule in rules}) == len(rules)
    asked: set[str] = set()
    for rule in rules:
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["expr"].count("(") == rule["expr"].count(")")
        asked |= set(re.findall(r"\bwidthwise_\w+", rule["expr"]))
    with serving(tmp_path / "data", broker_url=redis_url) as service:
        names = told_names(service)
    assert asked - names == set()
    assert "widthwise_nothing_total" not in names  # this test can fail
    for needed in ("queue_oldest", "jobs", "lease_losses", "uploads_refused", "step_seconds"):
        assert any(f"widthwise_{needed}" in name for name in asked)


def test_the_labels_that_alerts_choose_by_take_those_values(service: Service) -> None:
    text = ALERTS.read_text()
    assert set(re.findall(r'state="(\w+)"', text)) <= {"queued", "running"}
    assert set(re.findall(r'outcome="(\w+)"', text)) <= {"failed"}
    assert set(re.findall(r'stage="(\w+)"', text)) <= {"distil"}
    found = of_service(service)
    for state in ("queued", "running"):
        assert ("widthwise_jobs", (("device", "cpu"), ("state", state))) in found
    assert set(re.findall(r'noticed_by="(\w+)"', text)) == {"reconciler"}


def test_a_key_is_in_no_label(service: Service) -> None:
    key = service.new_key(Role.VIEWER)
    service.as_key(key.secret).get("/v1/jobs", params={"after": key.secret})
    told = generate_latest(service.services.metrics.registry).decode()
    assert key.id not in told
    assert "wwk_" not in told
