"""Constraints asked of a finished job: answered from what it stored, refused at their field."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jsonschema
import pytest

from compression.report import FormatReport, Interval, LatencyReport, SubnetworkReport
from compression.spec import CONFIDENCES
from jobs.states import JobState
from tests.api.conftest import Service, assert_problem


def measured(name: str, width: Fraction, *, drop: float, ms: float, mb: float) -> dict[str, Any]:
    """One sub-network as a job stores it, in ONNX, against a teacher that takes 10 ms."""
    latency = LatencyReport(
        p50_ms=ms,
        p95_ms=2 * ms,
        p99_ms=3 * ms,
        rounds=5,
        batch_size=1,
        seq_len=20,
        threads=1,
        p50_intervals=tuple(Interval(confidence=c, low=ms - 1, high=ms + 1) for c in CONFIDENCES),
        speedup=10 / ms,
    )
    report = SubnetworkReport(
        name=name,
        width_mult=width,
        heads=(2,),
        ffn=(4,),
        parameters=10,
        flops=20,
        accuracy=0.9 - drop / 100,
        accuracy_drop=drop,
        accuracy_drop_intervals=tuple(
            Interval(confidence=c, low=drop - 1, high=drop + 1) for c in CONFIDENCES
        ),
        formats=(
            FormatReport(
                format="onnx",
                published=True,
                size_bytes=int(mb * 1e6),
                latency=latency,
                latencies=(latency,),
                speedup=latency.speedup,
            ),
        ),
    )
    return report.model_dump(mode="json")


@pytest.fixture(scope="module")
def job_id(service: Service) -> str:
    """A job that has succeeded, with a bundle of each sub-network."""
    claim = service.claim(service.new_job())
    for path in ("w1/bundle.tar.gz", "w1_2/bundle.tar.gz", "w1_2/onnx/model.onnx"):
        service.publish(claim, path, b"content")
    subnetworks = [
        measured("w1", Fraction(1), drop=0.0, ms=9.0, mb=90),
        measured("w1_2", Fraction(1, 2), drop=0.5, ms=4.0, mb=70),
    ]
    report = {"main_metric": "f1", "subnetworks": subnetworks, "selection": {"subnetwork": "w1_2"}}
    service.finish(claim, report=report)
    return claim.job_id


def ask(service: Service, job_id: str, **constraints: Any) -> Any:
    return service.client.post(f"/v1/jobs/{job_id}/selection", json={"constraints": constraints})


def test_other_constraints_are_answered_from_the_stored_measurements(
    service: Service, job_id: str
) -> None:
    before = service.client.get(f"/v1/jobs/{job_id}").json()
    answer = ask(service, job_id, max_accuracy_drop=1).json()
    assert answer["selection"]["subnetwork"] == "w1_2"
    assert "1.0 points of F1" in answer["selection"]["reason"]
    assert sorted(each["path"] for each in answer["artifacts"]) == [
        "w1_2/bundle.tar.gz",
        "w1_2/onnx/model.onnx",
    ]
    sure = ask(service, job_id, max_accuracy_drop=1, confidence=0.95).json()
    assert (sure["job"], sure["constraints"]["confidence"]) == (job_id, 0.95)
    assert sure["selection"]["subnetwork"] == "w1"
    (effect,) = sure["selection"]["explanation"]["effects"]
    assert (effect["cut"], effect["nearest_miss"]["subnetwork"]) == (1, "w1_2")
    assert effect["relaxed"]["subnetwork"] == "w1_2"
    assert service.client.get(f"/v1/jobs/{job_id}").json() == before
    events = service.client.get(f"/v1/jobs/{job_id}/events").json()["items"]
    assert events[-1]["kind"] == "succeeded"


def test_constraints_that_nothing_holds_are_answered_with_the_nearest(
    service: Service, job_id: str
) -> None:
    answer = ask(service, job_id, max_latency_ms=5, latency_at={"percentile": 99}).json()
    assert answer["selection"]["subnetwork"] is None
    assert [each["subnetwork"] for each in answer["selection"]["nearest"]] == ["w1_2", "w1"]
    assert answer["artifacts"] == []


@pytest.mark.parametrize(
    ("constraints", "code", "pointer"),
    [
        ({"max_latency_ms": 0}, "invalid-request", "/constraints/max_latency_ms"),
        ({"max_price": 1}, "invalid-request", "/constraints/max_price"),
        ({"confidence": 0.5}, "invalid-request", "/constraints/confidence"),
        (
            {"latency_at": {"batch_size": 16}},
            "invalid-spec",
            "/constraints/latency_at/batch_size",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_at_its_field(
    service: Service, job_id: str, constraints: dict[str, Any], code: str, pointer: str
) -> None:
    problem = assert_problem(ask(service, job_id, **constraints), 422, code)
    assert problem["pointer"] == pointer


def test_a_job_that_has_not_succeeded_has_nothing_to_select_from(service: Service) -> None:
    queued = service.new_job()
    problem = assert_problem(ask(service, queued), 409, "job-not-succeeded")
    assert "is queued" in problem["detail"]
    claim = service.claim(service.new_job())
    service.finish(claim, JobState.FAILED, error={"code": "x", "message": "y"})
    assert_problem(ask(service, claim.job_id), 409, "job-not-succeeded")
    assert_problem(ask(service, "job_absent"), 404, "not-found")


def test_measurements_of_an_unknown_form_are_refused_and_not_guessed(service: Service) -> None:
    claim = service.claim(service.new_job())
    service.finish(claim, report={"subnetworks": [{"name": "w1"}]})
    assert_problem(ask(service, claim.job_id), 409, "report-unreadable")


def test_the_answer_and_the_examples_fit_their_documented_schemas(
    service: Service, job_id: str
) -> None:
    document = service.client.get("/openapi.json").json()
    operation = document["paths"]["/v1/jobs/{job_id}/selection"]["post"]
    components = {"components": document["components"]}
    assert {"401", "404", "409", "415", "422"} <= operation["responses"].keys()
    asked = operation["requestBody"]["content"]["application/json"]
    answered = operation["responses"]["200"]["content"]["application/json"]
    for example in asked["examples"].values():
        jsonschema.validate(example["value"], asked["schema"] | components)
    answer = ask(service, job_id, max_accuracy_drop=1, max_size_mb=1)
    jsonschema.validate(answer.json(), answered["schema"] | components)
